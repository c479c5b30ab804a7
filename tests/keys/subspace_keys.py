"""The keys of the section `subspace`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.interchange.adapter import adapter_tensors
from dist_subspace.interchange.peft.export import export_peft
from tests.keys.begun import begin, logits, randomised
from tests.keys.bench import UNSET, Bench
from tests.keys.reference import padded
from tests.keys.table import Key
from tests.tiny_models import tiny_model

IDS = torch.arange(7, 47).view(4, 10)
FEW = ["q_proj", "v_proj", "down_proj"]


def as_in_peft(
    bench: Bench, ours: Mapping[str, Any], theirs: Mapping[str, Any], values: bool = True
) -> tuple[Any, Any]:
    """(our model, PEFT's): the same trained parameters, by name and shape, and with the same values the same logits."""
    given = {"rank": 4, "alpha": 12, "target_modules": FEW, "init_from": UNSET} | dict(ours)
    model = begin(bench, {f"subspace.{key}": value for key, value in given.items()}).model
    usual = {"r": 4, "lora_alpha": 12, "target_modules": FEW, "task_type": "CAUSAL_LM"}
    reference = get_peft_model(bench.base_model(), LoraConfig(**(usual | dict(theirs))))
    trained = [sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (model, reference)]
    assert trained[0] == trained[1], f"{trained[0]} parameters are trained, and {trained[1]} in PEFT"
    if values:
        randomised(model)
        loaded = set_peft_model_state_dict(reference, {k: v.clone() for k, v in adapter_tensors(model).items()})
        assert not loaded.unexpected_keys
        assert not [key for key in loaded.missing_keys if "lora" in key or "modules_to_save" in key]
        torch.testing.assert_close(logits(model, IDS), logits(reference, IDS), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits(model, IDS), logits(bench.base_model(), IDS), atol=1e-2)
    return model, reference


def method(bench: Bench) -> None:
    as_in_peft(bench, {"method": UNSET}, {})
    as_in_peft(bench, {"method": "dora"}, {"use_dora": True})
    as_in_peft(bench, {"method": "rslora"}, {"use_rslora": True})


def rank(bench: Bench) -> None:
    as_in_peft(bench, {"rank": 3, "alpha": 3}, {"r": 3, "lora_alpha": 3})
    as_in_peft(bench, {"rank": UNSET, "alpha": UNSET}, {"r": 16, "lora_alpha": 32})


def alpha(bench: Bench) -> None:
    as_in_peft(bench, {"alpha": 2.5}, {"lora_alpha": 2.5})
    as_in_peft(bench, {"alpha": UNSET}, {"lora_alpha": 8})


def dropout(bench: Bench) -> None:
    """Of the adapter's inputs that share is zero and the rest as much larger, in training alone; the frozen path sees all."""
    for share in (0.3, 0.0):
        changes = {"init_from": UNSET, "rank": 4, "alpha": 4, "target_modules": ["q_proj"], "dropout": share}
        part = begin(bench, {f"subspace.{key}": value for key, value in changes.items()}).model
        layer = part.get_submodule("model.layers.0.self_attn.q_proj")
        found = {name.rpartition(".")[2]: p for name, p in layer.named_parameters() if p.requires_grad}
        with torch.no_grad():
            found["lora_A"].copy_(torch.eye(4, 32))
            found["lora_B"].copy_(torch.eye(32, 4))
            ones = torch.ones(1, 20000, 32)
            frozen = bench.base_model().model.layers[0].self_attn.q_proj(ones)
            seen = (layer.train()(ones) - frozen)[..., :4]
            zero, kept = seen.abs() < 1e-4, (seen - 1 / (1 - share)).abs() < 1e-4
            assert bool((zero | kept).all()), "what is kept is divided by the share that is kept"
            spread = (share * (1 - share) / zero.numel()) ** 0.5
            assert float(zero.float().mean()) == pytest.approx(share, abs=5 * spread), "the share that is dropped"
            torch.testing.assert_close((layer.eval()(ones) - frozen)[..., :4], torch.ones(1, 20000, 4))


def target_modules(bench: Bench) -> None:
    for names in (["o_proj", "up_proj"], "all-linear", r".*layers\.1\..*(k|up)_proj"):
        as_in_peft(bench, {"target_modules": names}, {"target_modules": names})
    as_in_peft(bench, {"target_modules": UNSET}, {"target_modules": "all-linear"})


def exclude_modules(bench: Bench) -> None:
    names = ["v_proj", "layers.1.self_attn.q_proj"]
    as_in_peft(bench, {"exclude_modules": names}, {"exclude_modules": names})


def modules_to_save(bench: Bench) -> None:
    names = ["lm_head", "layers.1.input_layernorm"]
    as_in_peft(bench, {"modules_to_save": names}, {"modules_to_save": names})


def target_parameters(bench: Bench) -> None:
    """Beside named modules, and alone, where linear layers are no targets."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    mixture = tiny_model("MixtralForCausalLM", config_name="MixtralConfig", vocab_size=len(bench.tokenizer), **sizes)
    base = bench.save_model(mixture, bench.folder / "mixture")
    for number, given in enumerate(({"target_modules": ["q_proj"]}, {"target_modules": UNSET})):
        keys = {"rank": 2, "alpha": 6, "init_from": UNSET, "target_parameters": names} | given
        model = begin(
            bench, {"model.path": str(base)} | {f"subspace.{key}": value for key, value in keys.items()}
        ).model
        randomised(model)
        out = export_peft(model, bench.folder / f"experts-{number}", report=None)
        reference = PeftModel.from_pretrained(mixture, out.folder)
        torch.testing.assert_close(logits(model, IDS), logits(reference, IDS), rtol=1e-4, atol=1e-5)
        reference.unload()


def expert_parameters(bench: Bench) -> None:
    """One pair of a stack for all of its experts is PEFT's stack with that pair for each."""
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    mixture = tiny_model("MixtralForCausalLM", config_name="MixtralConfig", vocab_size=len(bench.tokenizer), **sizes)
    base = bench.save_model(mixture, bench.folder / "mixture-shared")
    for value, experts in (("own", 3), ("shared", 1), (UNSET, 3)):
        keys = {"rank": 2, "init_from": UNSET, "target_parameters": ["experts.down_proj"], "target_modules": UNSET}
        keys |= {"expert_parameters": value}
        model = begin(
            bench, {"model.path": str(base)} | {f"subspace.{key}": given for key, given in keys.items()}
        ).model
        randomised(model)
        width, inner = mixture.config.hidden_size, mixture.config.intermediate_size
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == experts * mixture.config.num_hidden_layers * 2 * (width + inner)
        out = export_peft(model, bench.folder / f"experts-{value}", report=None)
        reference = PeftModel.from_pretrained(mixture, out.folder)
        torch.testing.assert_close(logits(model, IDS), logits(reference, IDS), rtol=1e-4, atol=1e-5)
        reference.unload()


def rank_pattern(bench: Bench) -> None:
    """alpha stays, so that the scale is another there."""
    ranks = {"v_proj": 2, "layers.1.self_attn.q_proj": 5}
    as_in_peft(bench, {"rank_pattern": ranks}, {"rank_pattern": ranks})


def alpha_pattern(bench: Bench) -> None:
    alphas = {"v_proj": 2.0, "layers.1.self_attn.q_proj": 30.0}
    as_in_peft(bench, {"alpha_pattern": alphas}, {"alpha_pattern": alphas})


def options(bench: Bench) -> None:
    """Two of lora's own: the activation between its factors under mpc_n, and how A begins."""
    for name, activation in (("gelu", functional.gelu), ("tanh", torch.tanh), (None, functional.relu)):
        chosen = {} if name is None else {"activation": name}
        ours = {"constraint": "mpc_n", "options": chosen}
        model, reference = as_in_peft(bench, ours, {}, values=False)
        set_peft_model_state_dict(reference, {k: v.clone() for k, v in adapter_tensors(randomised(model)).items()})
        for part, module in reference.named_modules():
            if part.endswith("lora_A.default"):
                module.register_forward_hook(lambda _, args, output, f=activation: f(output))
        torch.testing.assert_close(logits(model, IDS), logits(reference, IDS), rtol=1e-4, atol=1e-5)
    wide = {"rank": 16, "alpha": 16, "target_modules": "all-linear"}
    theirs = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
    for init, default in (("gaussian", "gaussian"), ("kaiming", True)):
        model, reference = as_in_peft(
            bench, wide | {"options": {"init": init}}, theirs | {"init_lora_weights": default}, values=False
        )
        one, other = (_all_of(m, "lora_A") for m in (model, reference))
        assert one.std() == pytest.approx(float(other.std()), rel=0.05), init
        assert (one.abs().max() > 3 * one.std()) == (init == "gaussian"), (
            "a normal distribution has tails, a uniform none"
        )


def _all_of(model: nn.Module, name: str) -> Tensor:
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if name in n])


def constraint(bench: Bench) -> None:
    """The step goes down the loss and λ/N Σ (‖A Aᵀ - I‖² + ‖Bᵀ B - I‖²), or the off-diagonal of Bᵀ B for mpc_d."""
    for kind in ("mpc_o", "mpc_d", None):
        _assert_step(bench, kind, 0.1)


def constraint_weight(bench: Bench) -> None:
    for weight in (2.0, 0.0):
        _assert_step(bench, "mpc_o", weight)


def _assert_step(bench: Bench, kind: str | None, weight: float) -> None:
    """One step of SGD from PEFT's adapter in two micro-batches, against plain torch on the loss that holds the penalty."""
    changes = {"training.optim": "sgd", "training.learning_rate": 0.05, "training.max_steps": 1}
    outcome = bench.run(changes | {"subspace.constraint": kind, "subspace.constraint_weight": weight})
    model = bench.peft_model().train()
    found = dict(model.named_parameters())
    pairs = [(p, found[n.replace("lora_A", "lora_B")]) for n, p in found.items() if "lora_A" in n]
    penalty = torch.zeros(())
    for a, b in pairs if kind is not None else []:
        gram = b.t() @ b
        wanted = torch.diag(gram.diagonal()) if kind == "mpc_d" else torch.eye(len(gram))
        penalty = penalty + (a @ a.t() - torch.eye(len(a))).square().sum() + (gram - wanted).square().sum()
    penalty = weight * penalty / len(pairs)
    loss = model(**padded(outcome.trained_on)).loss
    (loss + penalty).backward()
    line = outcome.steps[0]
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=2e-5), "the loss that is told holds no penalty"
    assert line.get("penalty", 0.0) == pytest.approx(float(penalty.detach()), rel=1e-4)
    for name, tensor in outcome.adapter.items():
        parameter = found[_in_model(name)]
        expected = parameter.detach() - 0.05 * parameter.grad
        torch.testing.assert_close(
            tensor, expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{kind}: {n}: {text}"
        )


def _in_model(name: str) -> str:
    """The parameter of PEFT's model with this name in a file."""
    if "lora" in name:
        return name.replace(".weight", ".default.weight")
    return name.removesuffix("weight") + "modules_to_save.default.weight"


def init_from(bench: Bench) -> None:
    """The values of an adapter that PEFT saved; unset, the method's own, with which the model is the base."""
    begun = begin(bench, {"subspace.init_from": str(bench.folder / "start")})
    expected = logits(bench.peft_model(), IDS)
    torch.testing.assert_close(logits(begun.model, IDS), expected, rtol=1e-4, atol=1e-5)
    anew = begin(bench, {"subspace.init_from": UNSET, "subspace.rank": 2, "subspace.target_modules": FEW}).model
    torch.testing.assert_close(logits(anew, IDS), logits(bench.base_model(), IDS))
    assert not torch.allclose(expected, logits(bench.base_model(), IDS), atol=1e-2)


_SAME = "PEFT: count, names, shapes, logits at the same values"
_STEP = "a step of plain torch on the loss with the definition's penalty"
KEYS = [
    Key("subspace.method", (UNSET, "dora", "rslora"), "what is trained, and how it acts", _SAME, method),
    Key("subspace.rank", (3, UNSET), "the shapes of A and B", _SAME, rank),
    Key("subspace.alpha", (2.5, UNSET), "the scale", _SAME, alpha),
    Key("subspace.dropout", (0.3, 0.0), "a share of the adapter's inputs", "the binomial distribution", dropout),
    Key(
        "subspace.target_modules",
        (["o_proj", "up_proj"], "all-linear", "a pattern"),
        "the layers",
        _SAME,
        target_modules,
    ),
    Key("subspace.exclude_modules", (["v_proj"],), "the layers", f"{_SAME} (exclude_modules=)", exclude_modules),
    Key("subspace.modules_to_save", (["lm_head", ...],), "modules trained in full", _SAME, modules_to_save),
    Key(
        "subspace.target_parameters",
        (["experts.gate_up_proj", ...],),
        "the stacks of experts",
        f"{_SAME} (target_parameters=)",
        target_parameters,
    ),
    Key(
        "subspace.expert_parameters",
        ("own", "shared"),
        "whose the parameters of a stack of experts are",
        f"{_SAME} (target_parameters=, the pair repeated for each expert)",
        expert_parameters,
    ),
    Key("subspace.rank_pattern", ({"v_proj": 2},), "shapes of single layers", f"{_SAME} (rank_pattern=)", rank_pattern),
    Key(
        "subspace.alpha_pattern",
        ({"v_proj": 2.0},),
        "scales of single layers",
        f"{_SAME} (alpha_pattern=)",
        alpha_pattern,
    ),
    Key(
        "subspace.options",
        ({"activation": "gelu"}, {"init": "gaussian"}),
        "the method's own: here what stands between its factors, and how A begins",
        "PEFT with torch's activation between; PEFT's init_lora_weights: spread and tails",
        options,
    ),
    Key("subspace.constraint", ("mpc_o", "mpc_d", None), "a penalty in the loss", _STEP, constraint),
    Key("subspace.constraint_weight", (2.0, 0.0), "the weight of the penalty", _STEP, constraint_weight),
    Key("subspace.init_from", ("PEFT's folder", UNSET), "the values it begins with", "PEFT's model: logits", init_from),
]
