"""Mixtures of experts whose stacks are packed: transformers' logits and gradients, saved, merged, and read again."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.families.experts import stacks_of
from dist_subspace.loading.experts_internals import NAME, adopt_stacks, routed
from dist_subspace.loading.original import original_stack
from dist_subspace.notices import heard
from dist_subspace.storage import FrozenLinear, FrozenStack, pack_stack
from tests.tiny_models import tiny_config, tiny_inputs

_LOCAL = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
_NAMED = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_LLAMA4 = {"intermediate_size_mlp": 24, "head_dim": 8, "pad_token_id": 0, "attention_chunk_size": 8}

# how the experts are held -> configuration
FAMILIES: dict[str, Any] = {
    "one by one in the file": tiny_config("MixtralConfig", **_LOCAL | {"num_local_experts": 11}),
    "beside a shared one": tiny_config("Qwen2MoeConfig", **_NAMED, shared_expert_intermediate_size=12),
    "as one tensor in the file": tiny_config("GraniteMoeConfig", **_LOCAL),
    "transposed, interleaved, with biases": tiny_config("GptOssConfig", **_LOCAL, head_dim=8, sliding_window=8),
    "transposed, each given every token": tiny_config("Llama4TextConfig", **_LOCAL | _LLAMA4),
}


def auto(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        model = auto(copy.deepcopy(config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def dense(stack: FrozenStack) -> Tensor:
    made = torch.stack([stack.expert(number).dense() for number in range(stack.experts)])
    return made.transpose(1, 2) if stack.transposed else made


def dequantised(model: nn.Module, folder: Path) -> Any:
    """transformers' model with the weights that ours really has."""
    plain = read(folder)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, FrozenStack):
                plain.get_parameter(name).copy_(dense(module))
            elif isinstance(module, FrozenLinear):
                plain.get_submodule(name).weight.copy_(module.dense())
    return plain


def stacks(model: nn.Module) -> dict[str, FrozenStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenStack)}


def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient before the first block."""
    weight = model.get_input_embeddings().weight
    weight.requires_grad_(True)
    given = tiny_inputs(model, labels=True)
    output = model(**given)
    (gradient,) = torch.autograd.grad(output.loss, weight)
    return output.logits.detach(), gradient


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_transformers_on_the_same_weights(
    family: str, storage: str, folders: dict[str, Path]
) -> None:
    told: list[str] = []
    with heard(told.append):
        model = dsub.load_frozen(folders[family], storage=storage, dtype="float32")
    held = stacks(model)
    mixtures = {name for name, module in read(folders[family]).named_modules() if stacks_of(module)}
    assert {name.rpartition(".")[0] for name in held} == mixtures and len(held) == 2 * len(mixtures) > 0
    assert not [sentence for sentence in told if "experts" in sentence]
    for ours, right in zip(outputs(model), outputs(dequantised(model, folders[family])), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_is_read_again_from_the_file(family: str, folders: dict[str, Path]) -> None:
    model, plain = dsub.load_frozen(folders[family], storage="nf4"), read(folders[family])
    for name, stack in stacks(model).items():
        right = plain.get_parameter(name)
        assert torch.equal(original_stack(stack), right.transpose(1, 2) if stack.transposed else right)


@pytest.mark.parametrize("family", ["one by one in the file", "transposed, interleaved, with biases"])
def test_a_merge_writes_the_stacks_of_the_chosen_base_as_the_family_holds_them(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = dsub.attach(
        dsub.load_frozen(folders[family], storage="nf4", dtype="float32"),
        dsub.SubspaceConfig(method="lora", rank=1, target_modules=["q_proj"]),
    )
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
        ours = model(**tiny_inputs(model)).logits
    report = dsub.merge(model, tmp_path / "held", report=None)
    held = stacks(model)
    again = read(tmp_path / "held")
    with torch.no_grad():
        torch.testing.assert_close(again(**tiny_inputs(again)).logits, ours, rtol=1e-4, atol=1e-4)
    plain = read(folders[family])
    for name, stack in held.items():
        right = plain.get_parameter(name)
        distance = torch.dist(dense(stack), right.detach()) / right.detach().norm()
        assert report.drift[name] == pytest.approx(float(distance), rel=1e-4)
    dsub.merge(model, tmp_path / "own", base="original", report=None)
    original = read(tmp_path / "own")
    assert all(torch.equal(original.get_parameter(name), plain.get_parameter(name)) for name in held)


@pytest.mark.parametrize("residual", ["stacked", "fold"])
def test_a_residual_of_experts_is_merged_onto_either_base(
    residual: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["transposed, interleaved, with biases"]
    options = {"svd": "exact", "residual": residual}
    model = dsub.load_frozen(folder, storage="nf4", dtype="float32")
    before = {name: dense(stack) for name, stack in stacks(model).items()}
    dsub.attach(model, dsub.SubspaceConfig(method="pissa", rank=2, alpha=2, target_parameters=BOTH, options=options))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
        ours = model(**tiny_inputs(model)).logits
    plain = read(folder)
    for base in ("dequantised", "original"):
        report = dsub.merge(model, tmp_path / base, base=base, report=None)
        merged = read(tmp_path / base)
        for name in before:
            part = model.get_submodule(name)
            update = (part.lora_B @ part.lora_A - part.lora_B0 @ part.lora_A0).detach().transpose(1, 2)
            held = dense(part.base) + (part.lora_B0 @ part.lora_A0).detach().transpose(1, 2) * (residual == "fold")
            right = (plain.get_parameter(name).detach() if base == "original" else held) + update
            torch.testing.assert_close(merged.get_parameter(name).detach(), right, rtol=1e-4, atol=1e-5)
            own = plain.get_parameter(name).detach()
            off = torch.dist(held, own) / own.norm()
            assert report.drift[name] == pytest.approx(float(off), rel=1e-3)
    with torch.no_grad():
        merged = read(tmp_path / "dequantised")
        torch.testing.assert_close(merged(**tiny_inputs(merged)).logits, ours, rtol=1e-4, atol=1e-4)


def test_an_adapter_beside_packed_experts_is_saved_with_their_storage_and_loaded_again(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["beside a shared one"]
    config = dsub.SubspaceConfig(method="lora", rank=2)
    model = dsub.attach(dsub.load_frozen(folder, storage="nf4", dtype="float32"), config)
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not [name for name in model.subspace.layers if name in stacks(model)]
    counted = {row.name: row.frozen for row in dsub.summary(model).rows}
    assert counted["gate_up_proj"] == sum(
        p.numel() for n, p in read(folder).named_parameters() if n.endswith("experts.gate_up_proj")
    )
    dsub.save_adapter(model, tmp_path / "adapter", base_model=folder)
    again = dsub.load_adapter(dsub.load_frozen(folder, storage="nf4", dtype="float32"), tmp_path / "adapter")
    given = tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)


# Methods on the experts.

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def with_peft(model: Any, family: str, method: str) -> Any:
    """PEFT's stack with the values of ours."""
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=[],
        target_parameters=BOTH,
        use_rslora=method == "rslora",
        init_lora_weights=False,
    )
    reference = peft.get_peft_model(read(family), settings)
    with torch.no_grad():
        for wrapper in [m for m in reference.modules() if type(m).__name__ == "ParamWrapper"]:
            stack = next(
                m
                for n, m in model.named_modules()
                if n.endswith(wrapper.parameter_name) and own_place(n) == place_in_peft(reference, wrapper)
            )
            a, b = stack.lora_A.detach(), stack.lora_B.detach()
            wrapper.lora_A["default"].weight.copy_(a.reshape(-1, a.shape[2]))
            wrapper.lora_B["default"].weight.copy_(b.permute(1, 2, 0).reshape(b.shape[1], -1))
    return reference


def own_place(name: str) -> str:
    return name.rpartition(".")[0]


def place_in_peft(reference: nn.Module, wrapper: nn.Module) -> str:
    name = next(name for name, module in reference.named_modules() if module is wrapper)
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("family", ["one by one in the file", "transposed, interleaved, with biases"])
def test_lora_on_experts_is_pefts(family: str, method: str, folders: dict[str, Path]) -> None:
    config = dsub.SubspaceConfig(method=method, rank=2, alpha=6, target_parameters=BOTH)
    model = dsub.attach(dsub.load_frozen(folders[family], storage="fp32"), config)
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference = with_peft(model, folders[family], method)
    given = tiny_inputs(model, labels=True)
    ours, right = model(**given), reference(**given)
    torch.testing.assert_close(ours.logits, right.logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.logits, read(folders[family])(**given).logits, atol=1e-2)
    ours.loss.backward()
    right.loss.backward()
    wrappers = [m for m in reference.modules() if type(m).__name__ == "ParamWrapper"]
    assert len(wrappers) == len(model.subspace.layers) == 4
    for wrapper in wrappers:
        stack = model.get_submodule(f"{place_in_peft(reference, wrapper)}.{wrapper.parameter_name}")
        a, b = (wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad)
        torch.testing.assert_close(stack.lora_A.grad, a.view(stack.lora_A.shape), rtol=1e-3, atol=1e-5)
        experts, d_out, rank = stack.lora_B.shape
        torch.testing.assert_close(
            stack.lora_B.grad, b.view(d_out, rank, experts).permute(2, 0, 1), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_method_on_experts_is_saved_loaded_and_merged(
    family: str, storage: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = dsub.SubspaceConfig(method="ssb" if storage == "nf4" else "lora", rank=2, target_parameters=BOTH)
    model = dsub.attach(dsub.load_frozen(folders[family], storage=storage, dtype="float32"), config)
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
        given = tiny_inputs(model)
        ours = model(**given).logits
        with dsub.disabled(model):
            frozen = model(**given).logits
        assert not torch.allclose(ours, frozen, atol=1e-2)
        bare = dsub.load_frozen(folders[family], storage=storage, dtype="float32")
        torch.testing.assert_close(bare(**given).logits, frozen, rtol=1e-4, atol=1e-4)
        dsub.save_adapter(model, tmp_path / "adapter", base_model=folders[family])
        again = dsub.load_adapter(bare, tmp_path / "adapter")
        torch.testing.assert_close(again(**given).logits, ours, rtol=1e-5, atol=1e-5)
        dsub.merge(model, tmp_path / "merged", report=None)
        torch.testing.assert_close(read(tmp_path / "merged")(**given).logits, ours, rtol=1e-4, atol=1e-4)


def test_experts_of_a_model_that_transformers_made_stay_as_they_are(folders: dict[str, Path]) -> None:
    model = read(folders["one by one in the file"])
    before = {name: p for name, p in model.named_parameters() if ".experts." in name}
    dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=1))
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert model.config._experts_implementation != NAME


def test_packed_experts_cannot_be_trained_in_full(folders: dict[str, Path]) -> None:
    for name in ("experts", "mlp"):
        model = dsub.load_frozen(folders["beside a shared one"], storage="int8")
        with pytest.raises(
            UsageError, match=rf"{name}', which names the experts .*experts.*held as int8: they cannot be"
        ):
            dsub.attach(model, dsub.SubspaceConfig(method="lora", modules_to_save=[name]))


@pytest.mark.parametrize("family", ["one by one in the file", "transposed, each given every token"])
def test_stacks_of_floats_become_operators_and_parameters_again(family: str, folders: dict[str, Path]) -> None:
    model, plain = dsub.load_frozen(folders[family], storage="fp32"), read(folders[family])
    names = [n for n, p in plain.named_parameters() if ".experts." in n and p.dim() == 3]
    adopt_stacks(model)
    assert list(stacks(model)) == names
    for ours, right in zip(outputs(model), outputs(plain), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    told: list[str] = []
    with heard(told.append):
        dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=1, modules_to_save=["experts"])).train()
    assert not stacks(model) and not [sentence for sentence in told if "experts" in sentence]
    plain.requires_grad_(True)
    given = tiny_inputs(model, labels=True)
    model(**given).loss.backward()
    plain(**given).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if ".experts.trained." in n}
    assert len(trained) == len(names) + sum(n.endswith("_bias") for n in trained)
    for name in names:
        gradient = trained[name.replace(".experts.", ".experts.trained.")].grad
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def test_experts_that_a_class_multiplies_with_in_its_own_way_are_said(tmp_path: Path) -> None:
    sizes = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
    }
    sizes |= {"ffn_config": {"ffn_hidden_size": 44, "moe_num_experts": 4, "moe_top_k": 2}}
    config = tiny_config("DbrxConfig", **sizes)
    auto(config).save_pretrained(tmp_path)
    told: list[str] = []
    with heard(told.append):
        model = dsub.load_frozen(tmp_path, storage="nf4")
    held = {n: p for n, p in model.named_parameters() if ".experts." in n}
    size = sum(p.numel() * p.element_size() for p in held.values()) / 2**10
    (said,) = [sentence for sentence in told if "experts" in sentence]
    assert said.startswith(f"{size:,.1f} KiB are bfloat16: {len(held)} stacks ({next(iter(held))}, ")
    assert said.endswith("of experts, not held in nf4: their class multiplies with them in a way of its own")


# What transformers' interface promises, and what a family does not do alone.


class Mixture(nn.Module):
    """The least that transformers' interface gives a class of experts."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = False, True, False, True

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.randn(experts, 6, 5))
        self.down_proj = nn.Parameter(torch.randn(experts, 5, 6))
        self.up_proj_bias = nn.Parameter(torch.randn(experts, 6))
        self.down_proj_bias = nn.Parameter(torch.randn(experts, 5))
        self.act_fn, self.post_expert_norm = nn.SiLU(), nn.LayerNorm(5)

    def right(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for token, (ids, own) in enumerate(zip(index.tolist(), weights, strict=True)):
            row = torch.zeros(5)
            for e, weight in zip(ids, own, strict=True):
                if e < self.num_experts:
                    inner = self.act_fn(self.up_proj[e] @ x[token] + self.up_proj_bias[e])
                    row = row + weight * self.post_expert_norm(self.down_proj[e] @ inner + self.down_proj_bias[e])
            rows.append(row)
        return torch.stack(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_biases_norms_and_indices_of_no_expert(packed: bool) -> None:
    mixture = Mixture(4).requires_grad_(False)
    x, weights = torch.randn(3, 5), torch.rand(3, 2)
    index = torch.tensor([[3, 1], [4, 3], [0, 4]])  # 4 stands for none
    right = mixture.right(x, index, weights)
    if packed:
        for name in ("up_proj", "down_proj"):
            stack = pack_stack(getattr(mixture, name), "fp32")
            delattr(mixture, name)
            setattr(mixture, name, stack)
    torch.testing.assert_close(routed(mixture, x, index, weights), right, rtol=1e-4, atol=1e-5)


def test_what_is_used_of_transformers_is_still_there(folders: dict[str, Path]) -> None:
    assert ALL_EXPERTS_FUNCTIONS[NAME] is routed
    model = dsub.load_frozen(folders["one by one in the file"], storage="nf4")
    assert model.config._experts_implementation == NAME
    assert "experts_implementation" not in str(model.config.to_dict()), "a saved configuration does not name it"
    experts = model.model.layers[0].mlp.experts
    assert stacks_of(experts) is not None and callable(experts._apply_gate)
    model.set_experts_implementation("eager")
    with pytest.raises(UsageError, match="reads a stack of experts that is held as nf4"):
        model(**tiny_inputs(model))


# Classes that multiply with their experts in a way of their own.


def own_class(name: str) -> tuple[Any, Tensor, Tensor]:
    """A module of transformers, which experts each token goes to, and with which weight."""
    sizes = {"hidden_size": 10, "hidden_act": "silu", "moe_intermediate_size": 6, "expert_ffn_hidden_size": 6}
    config = SimpleNamespace(**sizes, num_local_experts=4, n_routed_experts=4, zero_expert_num=2)
    limit = {"swiglu_limit": 0.2} if name == "Step3p7" else {}
    module = {"LongcatFlash": LongcatFlashExperts, "Step3p7": Step3p7Experts}[name](config, **limit)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    experts = 6 if name == "LongcatFlash" else 4
    chosen = torch.rand(9, experts, generator=generator).topk(2, dim=1).indices
    return module, chosen, torch.rand(9, 2, generator=generator)


@pytest.mark.parametrize("name", ["LongcatFlash", "Step3p7"])
def test_classes_of_their_own_compute_what_their_own_forward_does(name: str) -> None:
    module, chosen, weights = own_class(name)
    x = torch.randn(9, 10)
    expected_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = module(expected_x, chosen, weights)
    held = nn.Module()
    held.experts = copy.deepcopy(module)
    adopt_stacks(held)
    assert len(stacks(held)) == 2
    ours = held.experts(ours_x, chosen, weights)
    torch.testing.assert_close(ours, expected)
    g = torch.randn(9, 10)
    ours.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours_x.grad, expected_x.grad)
