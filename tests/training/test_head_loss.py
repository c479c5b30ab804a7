"""The loss that is made inside the head is transformers' own: its value, the adapter's gradients, on split parameters too."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, disabled, load_frozen
from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.module_places import hook_names
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import gathered
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import named_trainables, trainable_parameters
from dist_subspace.training import cross_entropy
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.data.packed_attention import enable_packing
from dist_subspace.training.loss import micro_batch_loss, whole_logits_because
from tests.benchmarks.memory import peak_bytes
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import VOCABULARY, odd_model, save_odd, tiny_model

CPU = torch.device("cpu")
# class -> what its configuration says beside the tiny sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 8, "num_key_value_heads": 2},
    "MistralForCausalLM": {},
    "Gemma2ForCausalLM": {"final_logit_softcapping": 5.0, "head_dim": 8, "num_key_value_heads": 2},
    "Gemma3ForCausalLM": {"config": "Gemma3TextConfig", "final_logit_softcapping": 4.0, "head_dim": 8},
    "GraniteForCausalLM": {"logits_scaling": 3.0},
    "CohereForCausalLM": {"logit_scale": 0.25},
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "OPTForCausalLM": {},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE", 3 * VOCABULARY)


def family(name: str, **changes: Any) -> Any:
    overrides = {**FAMILIES.get(name, {}), **changes}
    config = overrides.pop("config", name.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config"))
    return tiny_model(name, config_name=config, **overrides)


def batch_of(vocabulary: int = VOCABULARY, rows: int = 3, length: int = 9) -> MicroBatch:
    """Prompts that are no targets, and a row that ends early."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    targets = int((labels[:, 1:] != -100).sum())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return MicroBatch(0, inputs, labels, targets, rows, ids.numel())


def with_gradients(model: Any, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {n: p.grad.detach().clone() for n, p in named_trainables(model).items() if p.grad is not None}
    return float(loss.detach()), found


def transformers_own(model: Any, batch: MicroBatch) -> Tensor:
    loss: Tensor = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
    return loss * batch.targets


def assert_is_transformers(model: Any, batch: MicroBatch, tolerance: float = 1e-5) -> None:
    loss, found = with_gradients(model, micro_batch_loss(model, batch, CPU))
    expected_loss, expected = with_gradients(model, transformers_own(model, batch))
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 10 * tolerance * float(gradient.norm()) + 1e-7, name


def adapted(model: Any, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """With an adapter that is no longer zero."""
    attach(model.to(dtype), SubspaceConfig(**{"method": "lora", "rank": 2, **config})).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_transformers_loss_with_its_gradients(name: str, dtype: torch.dtype) -> None:
    model = adapted(family(name), dtype)
    assert whole_logits_because(model, batch_of(), CPU) is None
    assert_is_transformers(model, batch_of(), 1e-5 if dtype == torch.float32 else 1e-2)


def test_a_cap_and_a_scale_are_found_whatever_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("LlamaForCausalLM")
    plain = type(model).forward

    def forward(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output["logits"] = torch.tanh(output["logits"] * 0.7) * 3.0
        if labels is not None:
            output["loss"] = self.loss_function(output["logits"], labels, vocab_size=VOCABULARY)
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    adapted(model)
    batch = batch_of()
    del batch.inputs["attention_mask"]
    assert whole_logits_because(model, batch, CPU) is None
    assert_is_transformers(model, batch)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"method": "ssl", "modules_to_save": ["embed_tokens"]},
        {"new_tokens": [VOCABULARY, VOCABULARY + 1]},
        {"new_tokens": [5, VOCABULARY]},
        {"method": "prompt", "options": {"num_virtual_tokens": 3}},
        {"method": "prefix", "options": {"num_virtual_tokens": 3}},
        {"method": "dora", "constraint": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_trained_heads_new_tokens_and_virtual_ones_have_their_part(config: dict[str, Any], tied: bool) -> None:
    if config.get("method") in ("prompt", "prefix"):
        config = {"rank": None, **config}
    model = adapted(family("LlamaForCausalLM", tie_word_embeddings=tied), **config)
    assert whole_logits_because(model, batch_of(), CPU) is None
    assert_is_transformers(model, batch_of())


def test_new_tokens_as_targets_have_their_part() -> None:
    model = adapted(family("LlamaForCausalLM"), new_tokens=[VOCABULARY, VOCABULARY + 1])
    batch = batch_of()
    for where in (batch.inputs["input_ids"], batch.labels):
        where[0, 4], where[2, 8] = VOCABULARY, VOCABULARY + 1
    assert_is_transformers(model, batch)


def test_packed_rows_have_their_part() -> None:
    model = adapted(family("LlamaForCausalLM"))
    enable_packing(model)
    batch = batch_of(rows=2, length=10)
    positions = torch.cat([torch.arange(4), torch.arange(6)]).expand(2, -1)
    batch.labels[:, 4] = -100
    inputs = {"input_ids": batch.inputs["input_ids"], "position_ids": positions}
    packed = MicroBatch(0, inputs, batch.labels, int((batch.labels[:, 1:] != -100).sum()), 4, 20)
    assert whole_logits_because(model, packed, CPU) is None
    assert_is_transformers(model, packed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = adapted(family("LlamaForCausalLM"))
    _, plain = with_gradients(model, micro_batch_loss(model, batch_of(), CPU))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_is_transformers(model, batch_of())
    _, found = with_gradients(model, micro_batch_loss(model, batch_of(), CPU))
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)


def test_the_base_alone_is_measured_where_the_adapter_is_switched_off() -> None:
    model = adapted(family("LlamaForCausalLM"), modules_to_save=["lm_head"])
    with disabled(model), torch.no_grad():
        loss, expected = micro_batch_loss(model, batch_of(), CPU), transformers_own(model, batch_of())
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert_is_transformers(model, batch_of())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.parametrize("config", [{}, {"new_tokens": [5, VOCABULARY]}], ids=str)
def test_in_an_autocast_it_is_transformers_loss_of_logits_in_that_type(name: str, config: dict[str, Any]) -> None:
    model = adapted(family(name), **config)
    outside = float(micro_batch_loss(model, batch_of(), CPU).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert whole_logits_because(model, batch_of(), CPU) is None
        assert_is_transformers(model, batch_of(), 1e-2)
        inside = float(micro_batch_loss(model, batch_of(), CPU).detach())
        assert inside != outside
    assert float(micro_batch_loss(model, batch_of(), CPU).detach()) == outside


def test_in_an_autocast_a_head_that_is_trained_keeps_its_logits_whole() -> None:
    model = adapted(family("LlamaForCausalLM"), modules_to_save=["lm_head"])
    assert whole_logits_because(model, batch_of(), CPU) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(whole_logits_because(model, batch_of(), CPU))
        assert_is_transformers(model, batch_of(), 1e-2)
    assert whole_logits_because(model, batch_of(), CPU) is None


# Where the head's rows do not say the loss.


def masking(head: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.index_fill(-1, torch.tensor([5]), -3.0)


def test_a_model_that_does_more_with_its_logits_keeps_them_whole() -> None:
    model = adapted(family("LlamaForCausalLM"), target_modules=["q_proj", "lm_head"])
    assert "Lora" in str(whole_logits_because(model, batch_of(), CPU))
    assert_is_transformers(model, batch_of())


def test_a_hook_that_comes_and_goes_is_noticed() -> None:
    model = adapted(family("LlamaForCausalLM"))
    assert whole_logits_because(model, batch_of(), CPU) is None
    handle = model.lm_head.register_forward_hook(masking)
    assert "something else" in str(whole_logits_because(model, batch_of(), CPU))
    assert_is_transformers(model, batch_of())
    handle.remove()
    assert whole_logits_because(model, batch_of(), CPU) is None
    assert_is_transformers(model, batch_of())


def test_a_hook_on_the_model_that_changes_its_logits_is_noticed() -> None:
    model = adapted(family("LlamaForCausalLM"))
    assert whole_logits_because(model, batch_of(), CPU) is None

    def shut(module: nn.Module, args: Any, output: Any) -> Any:
        output["logits"] = masking(module, args, output["logits"])
        return output

    handle = model.register_forward_hook(shut)
    assert "something else" in str(whole_logits_because(model, batch_of(), CPU))
    handle.remove()
    assert whole_logits_because(model, batch_of(), CPU) is None


def test_a_model_whose_logits_are_changed_in_place_keeps_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Chameleon does with the ids of its images."""
    model = family("LlamaForCausalLM")
    plain = type(model).forward

    def forward(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output["logits"][:, :, 2] = torch.finfo(output["logits"].dtype).min
        if labels is not None:
            output["loss"] = self.loss_function(output["logits"], labels, vocab_size=VOCABULARY)
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    adapted(model)
    batch = batch_of()
    del batch.inputs["attention_mask"]
    assert "__setitem__" in str(whole_logits_because(model, batch, CPU))
    assert_is_transformers(model, batch)


def test_a_model_that_does_another_thing_later_has_a_loss_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which skips the step: as the loop does with every such loss."""
    model = family("LlamaForCausalLM")
    plain, factor = type(model).forward, [1.0]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output["logits"] = output["logits"] * factor[0]
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    adapted(model)
    batch = batch_of()
    del batch.inputs["attention_mask"]
    assert micro_batch_loss(model, batch, CPU).isfinite()
    factor[0] = 1.5
    loss = micro_batch_loss(model, batch, CPU)
    assert loss.isnan()
    loss.backward()
    assert any(p.grad is not None and p.grad.isnan().any() for p in trainable_parameters(model)), "which ZeRO looks at"


def test_nothing_stays_on_the_model_and_others_get_their_logits() -> None:
    model = adapted(family("LlamaForCausalLM"))
    head = output_embeddings(model)
    assert head is not None
    hooks, batch = (hook_names(head), hook_names(model)), batch_of()
    before = model(**batch.inputs).logits.detach()
    micro_batch_loss(model, batch, CPU)
    with pytest.raises(RuntimeError):
        micro_batch_loss(model, MicroBatch(0, batch.inputs, batch.labels[:, :4], 3, 3, 12), CPU)
    assert (hook_names(head), hook_names(model)) == hooks
    assert torch.equal(model(**batch.inputs).logits, before)


def test_a_step_never_holds_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, batch = 8192, batch_of(rows=4, length=33)
    monkeypatch.setattr(cross_entropy, "PIECE", 8 * vocabulary)
    model = adapted(family("LlamaForCausalLM", vocab_size=vocabulary), torch.bfloat16)
    assert whole_logits_because(model, batch, CPU) is None
    ours = peak_bytes(lambda: micro_batch_loss(model, batch, CPU).backward())
    plain = peak_bytes(lambda: transformers_own(model, batch).backward())
    in_16_bits = 4 * 33 * vocabulary * 2
    assert ours < in_16_bits < 4 * in_16_bits < plain


# On ranks that split the model.


class Watch:
    """How often the head's weight was asked for while it was whole, and while it was not."""

    def __init__(self, head: FrozenLinear) -> None:
        self.whole, self.products, self.head = True, 0, head
        for name in ("product", "transposed_product"):
            setattr(head, name, partial(self._seen, getattr(head, name)))

    def _seen(self, product: Any, x: Tensor) -> Tensor:
        self.products += 1
        self.whole &= all(p.numel() > 0 for p in self.head.parameters())
        result: Tensor = product(x)
        return result


def stepped(folder: str, stage: int, config: dict[str, Any], plain: bool) -> dict[str, Any]:
    """Two steps; losses, trained parameters, and what was seen of the head."""
    size, rank = world().size, world().rank
    model = load_frozen(folder, storage="nf4", dtype="float32", deepspeed=tiny.ds_config(stage, world_size=size))
    adapted_model = attach(model, SubspaceConfig(**{"method": "lora", "rank": 3, **config})).train()
    head, losses = adapted_model.lm_head, []
    engine = tiny.make_engine(adapted_model, tiny.ds_config(stage, trainable_numel=1 << 20, world_size=size))
    watch = Watch(head) if isinstance(head, FrozenLinear) else None
    for step in range(2):
        ids = tiny.own_batch(step, rank, size)
        batch = MicroBatch(0, {"input_ids": ids}, ids, ids[:, 1:].numel(), len(ids), ids.numel())
        if plain:
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            loss = micro_batch_loss(engine, batch, CPU) / batch.targets
        held = sum(p.numel() for p in head.parameters() if not p.requires_grad)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    with gathered(trainable_parameters(adapted_model)):
        values = {name: p.detach().clone() for name, p in named_trainables(adapted_model).items()}
    why = None if plain else whole_logits_because(engine, batch, CPU)
    engine.destroy()
    seen = None if watch is None else (watch.whole, watch.products > 0)
    return {"losses": losses, "values": values, "why": why, "seen": seen, "held": held}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"new_tokens": [5, tiny.VOCABULARY]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_under_zero_3_it_trains_as_transformers_loss_does(config: dict[str, Any], ranks: int, llama: str) -> None:
    ours, theirs = (run_on_ranks(ranks, stepped, llama, 3, config, plain) for plain in (False, True))
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)
        assert (one["why"] is None) == (not config.keys() & {"target_modules", "modules_to_save"})
        for name, expected in other["values"].items():
            torch.testing.assert_close(one["values"][name], expected, rtol=1e-4, atol=1e-6)


def in_stock_engine(folder: str, stage: int, section: dict[str, Any], storage: str) -> tuple[Any, ...]:
    """The losses of a micro-batch by the head and by the engine's own forward, the adapter's gradients of both, and why not."""
    dtype = "bfloat16" if "bf16" in section else "float32"
    config = {**tiny.ds_config(stage, trainable_numel=1 << 20), **section}
    model = load_frozen(folder, storage=storage, dtype=dtype, deepspeed=config)
    adapted_model = attach(model, SubspaceConfig(method="lora", rank=3)).train()
    engine = tiny.make_engine(adapted_model, config)
    ids = tiny.own_batch(0, 0, 1)
    batch, found = MicroBatch(0, {"input_ids": ids}, ids, ids[:, 1:].numel(), len(ids), ids.numel()), []
    for plain in (False, True):
        loss = (
            engine(input_ids=ids, labels=ids, use_cache=False).loss
            if plain
            else micro_batch_loss(engine, batch, CPU) / batch.targets
        )
        engine.backward(loss)
        found += [float(loss.detach()), {n: safe_get_full_grad(p) for n, p in named_trainables(adapted_model).items()}]
        engine.optimizer.zero_grad()
        engine.zero_grad()
    why = whole_logits_because(engine, batch, CPU)
    engine.destroy()
    return (*found, why)


@pytest.mark.parametrize(
    "section", [{"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}]
)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_in_an_engine_of_16_bits_it_is_that_engines_loss(section: dict[str, Any], stage: int, llama: str) -> None:
    storage = "bf16" if "bf16" in section else "nf4"
    ((loss, gradients, expected, others, why),) = run_on_ranks(1, in_stock_engine, llama, stage, section, storage)
    assert why is None
    assert loss == pytest.approx(expected, rel=1e-2)
    assert others and None not in others.values()
    for name, gradient in others.items():
        assert float((gradients[name] - gradient).norm()) <= 3e-2 * float(gradient.norm()) + 1e-6, name


@pytest.mark.parametrize("ranks", [1, 2])
def test_under_zero_3_the_head_is_whole_for_its_loss_and_let_go_behind_it(ranks: int, llama: str) -> None:
    for rank in run_on_ranks(ranks, stepped, llama, 3, {}, False):
        assert rank["seen"] == (True, True) and rank["held"] == 0


def test_the_odd_models_head_is_no_operator_of_a_packed_storage() -> None:
    """What the watch above relies on."""
    assert odd_model("llama").get_output_embeddings() is not None
