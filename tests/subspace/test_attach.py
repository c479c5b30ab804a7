"""`attach` on transformers models: identity at the start, only the adapter trains, the model stays a transformers model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from dist_subspace import SubspaceConfig, advance, attach, disabled, methods, trainable_parameters
from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceLinear, SubspacePart, TrainedCopy, attached, named_trainables
from tests.sampled import pairs
from tests.tiny_models import FAMILIES, logits, tiny_config, tiny_inputs, tiny_model

each_method = pytest.mark.parametrize("method", sorted(methods()))
each_pair = pytest.mark.parametrize(("name", "method"), pairs(FAMILIES, sorted(methods())))


def attach_tiny(model: nn.Module, method: str = "lora", **config: Any) -> Any:
    rank = 2 if methods()[method].uses_rank else None
    return attach(model, SubspaceConfig(method=method, **{"rank": rank, **config}))


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(8)
    for parameter in trainable_parameters(model):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("name", "method"), pairs(FAMILIES, sorted(name for name, info in methods().items() if info.identity))
)
def test_at_the_start_the_model_computes_what_it_did(name: str, method: str) -> None:
    model = tiny_model(name)
    before = logits(model)
    torch.testing.assert_close(logits(attach_tiny(model, method)), before, rtol=1e-5, atol=1e-5)


@each_pair
def test_disabled_gives_exactly_the_bases_output_and_only_within_its_block(name: str, method: str) -> None:
    model = attach_tiny(tiny_model(name), method)
    with disabled(model):
        start = logits(model)
    randomise(model)
    changed = logits(model)
    assert not torch.allclose(changed, start, atol=1e-3)
    with disabled(model) as same, pytest.raises(KeyError):
        assert same is model and torch.equal(logits(model), start)
        raise KeyError
    assert torch.equal(logits(model), changed)


@each_pair
def test_only_the_adapter_is_trained_and_all_of_it_is_reached(name: str, method: str) -> None:
    rank = 8 if methods()[method].uses_rank else None  # so many that a ReLU cuts some of them, never all
    model = randomise(attach_tiny(tiny_model(name), method, rank=rank)).train()
    advance(model, 1, 3)  # LoRA-Dash's strengths are reached from its switch on
    model(**tiny_inputs(model, labels=True)).loss.backward()
    trained = {id(p) for m in model.modules() if isinstance(m, SubspacePart) for p in m.trainables().values()}
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), parameter_name
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    assert {id(p) for p in trainable_parameters(model)} == trained
    assert all(p.grad.abs().sum() > 0 for p in trainable_parameters(model))


def test_initial_values_do_not_depend_on_which_other_layers_are_targets() -> None:
    few = named_trainables(attach_tiny(tiny_model(), target_modules=["v_proj"]))
    many = named_trainables(attach_tiny(tiny_model()))
    torch.manual_seed(99)  # nor on what was drawn before
    again = named_trainables(attach_tiny(tiny_model()))
    other = named_trainables(attach_tiny(tiny_model(), seed=1))
    assert len(few) == 4 and len(many) == 28
    assert all(torch.equal(many[key], value) for key, value in few.items())
    assert all(torch.equal(many[key], value) for key, value in again.items())
    assert not any(torch.equal(other[key], value) for key, value in many.items() if key.endswith("lora_A"))


def test_layers_of_one_shape_start_differently() -> None:
    values = named_trainables(attach_tiny(tiny_model(), target_modules=["q_proj"]))
    first, second = (value for key, value in values.items() if key.endswith("lora_A"))
    assert not torch.equal(first, second)


def test_attaching_twice_is_refused() -> None:
    model = attach_tiny(tiny_model())
    before = set(named_trainables(model))
    with pytest.raises(UsageError, match="the model has a subspace method already"):
        attach_tiny(model, "ssl")
    assert set(named_trainables(model)) == before


def test_a_model_without_a_method_says_so() -> None:
    with pytest.raises(UsageError, match="the model has no subspace method; call attach first"):
        attached(tiny_model())


def test_a_rank_above_a_layers_width_names_the_layer() -> None:
    model = tiny_model()
    message = r"subspace\.rank is 17, but model\.layers\.0\.self_attn\.k_proj is 16 x 32; accepted: at most 16 "
    with pytest.raises(UsageError, match=message):
        attach(model, SubspaceConfig(rank=17, target_modules=["q_proj", "k_proj"]))
    assert not any(isinstance(m, SubspaceLinear) for m in model.modules()), "refused, but attached in part"
    attach(model, SubspaceConfig(rank=16))


def test_a_refused_model_computes_as_before_and_can_be_attached_after_all() -> None:
    model = tiny_model()
    before = logits(model)
    with pytest.raises(UsageError):
        attach_tiny(model, target_modules=["nothing"])
    torch.testing.assert_close(logits(model), before)
    assert len(trainable_parameters(attach_tiny(model))) == 28


def test_the_end_of_an_inner_disabled_block_does_not_end_the_outer_one() -> None:
    model = attach_tiny(tiny_model("Qwen2ForCausalLM"), modules_to_save=["lm_head"], new_tokens=[])
    before = logits(model)
    randomise(model)
    changed = logits(model)
    with disabled(model):
        with disabled(model):
            pass
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model), changed)
    assert not torch.allclose(changed, before, atol=1e-3)


# docs/failures.md, "Gradient checkpointing finds nothing that requires a gradient".


def gradients(model: Any, **checkpointing: Any) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    torch.manual_seed(4)  # of the adapters' dropout
    model(**tiny_inputs(model, labels=True)).loss.backward()
    return {name: p.grad.clone() for name, p in named_trainables(model).items()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification", "OPTForCausalLM"]
)
def test_gradients_are_equal_with_checkpointing_on_and_off(name: str, reentrant: bool) -> None:
    plain = gradients(randomise(attach_tiny(tiny_model(name), dropout=0.3)))
    checkpointed = gradients(randomise(attach_tiny(tiny_model(name), dropout=0.3)), use_reentrant=reentrant)
    assert plain.keys() == checkpointed.keys() and any(g.abs().max() > 0 for g in plain.values())
    for key, expected in plain.items():
        torch.testing.assert_close(checkpointed[key], expected, rtol=1e-4, atol=1e-6)


@each_method
def test_every_method_trains_under_reentrant_checkpointing(method: str) -> None:
    plain = gradients(randomise(attach_tiny(tiny_model(), method)))
    checkpointed = gradients(randomise(attach_tiny(tiny_model(), method)), use_reentrant=True)
    for key, expected in plain.items():
        torch.testing.assert_close(checkpointed[key], expected, rtol=1e-4, atol=1e-6)


# What transformers offers goes on working.


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "T5ForConditionalGeneration"]
)
def test_generate_gives_the_bases_text_at_the_start_and_another_after_training(name: str) -> None:
    base, model = tiny_model(name), attach_tiny(tiny_model(name))
    inputs = {key: value for key, value in tiny_inputs(model).items() if not key.startswith("decoder")}
    expected = base.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)
    randomise(model)
    changed = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert changed.shape != expected.shape or not torch.equal(changed, expected)
    uncached = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(changed, uncached)


def test_a_half_precision_model_and_autocast_work() -> None:
    model = randomise(attach_tiny(tiny_model().to(torch.bfloat16)))
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    full = attach_tiny(tiny_model()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full(**tiny_inputs(full, labels=True)).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(full))


# modules_to_save


def saved_copies(model: nn.Module) -> dict[str, TrainedCopy]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedCopy)}


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("BertForSequenceClassification", "classifier", {"classifier"}),
        ("RobertaForSequenceClassification", "classifier", {"classifier"}),
        ("Qwen2ForCausalLM", "lm_head", {"lm_head"}),
        ("Qwen2ForCausalLM", "embed_tokens", {"model.embed_tokens"}),
        ("LlamaForCausalLM", "lm_head", {"lm_head", "model.embed_tokens"}),  # tied: both, or they would part
        ("LlamaForCausalLM", "embed_tokens", {"lm_head", "model.embed_tokens"}),
        ("GPT2LMHeadModel", "wte", {"lm_head", "transformer.wte"}),
        ("LlamaForCausalLM", "model.norm", {"model.norm"}),
    ],
)
def test_a_module_to_save_is_trained_in_full(name: str, module: str, expected: set[str]) -> None:
    original = tiny_model(name)
    before = logits(original)
    model = attach_tiny(original, modules_to_save=[module])
    assert set(saved_copies(model)) == expected
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model.train()(**tiny_inputs(model, labels=True)).loss.backward()
    for trained in saved_copies(model).values():
        assert trained.trainables() and all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in trained.trainables().values()
        )
        assert not any(p.requires_grad for p in trained.original.parameters())
    randomise(model)
    with disabled(model):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_tied_modules_that_are_saved_stay_tied() -> None:
    model = attach_tiny(tiny_model(), modules_to_save=["lm_head"])
    assert model.lm_head.trained.weight is model.model.embed_tokens.trained.weight
    assert model.lm_head.original.weight is model.model.embed_tokens.original.weight
    assert model.lm_head.weight is model.lm_head.trained.weight
    with disabled(model):
        assert model.lm_head.weight is model.lm_head.original.weight
    assert len(trainable_parameters(model)) == 28 + 1


def test_a_saved_module_is_no_target() -> None:
    model = attach_tiny(tiny_model(), target_modules=["lm_head", "q_proj"], modules_to_save=["lm_head"])
    assert attached(model).layers == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    inside = attach_tiny(
        tiny_model("RobertaForSequenceClassification"), target_modules=["dense"], modules_to_save=["classifier"]
    )
    assert not any(layer.startswith("classifier") for layer in attached(inside).layers)


def test_a_saved_copy_is_float32_beside_a_half_precision_model() -> None:
    for name, module in (("Qwen2ForCausalLM", "lm_head"), ("LlamaForCausalLM", "embed_tokens")):
        model = attach_tiny(tiny_model(name).to(torch.bfloat16), modules_to_save=[module]).train()
        copies = saved_copies(model).values()
        assert all(p.dtype == torch.float32 for copy in copies for p in copy.trainables().values())
        output = model(**tiny_inputs(model, labels=True))
        assert name != "Qwen2ForCausalLM" or output.logits.dtype == torch.float32, "a loss wants a head's float32"
        output.loss.backward()
        assert all(p.grad is not None for copy in copies for p in copy.trainables().values())


def test_an_unknown_module_to_save_shows_names_that_exist() -> None:
    with pytest.raises(UsageError, match=r"subspace\.modules_to_save has 'head', which names no module; .*lm_head"):
        attach_tiny(tiny_model(), modules_to_save=["head"])


@pytest.fixture(autouse=True)
def no_gradient_left_disabled() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()


def test_olmos_clamp_of_its_projections_in_place_trains_as_in_peft() -> None:
    config = tiny_config("OlmoConfig", num_hidden_layers=1, clip_qkv=0.02)
    torch.manual_seed(0)
    plain = transformers.OlmoForCausalLM(config)
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"])
    )
    ours = attach(plain, SubspaceConfig(rank=2, alpha=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    mine = {name.replace(".default", ""): p for name, p in ours.named_parameters() if p.requires_grad}
    other = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if p.requires_grad}
    ids = torch.arange(3, 20)[None]
    for name, parameter in other.items():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        mine[name.replace(".default.weight", "")].data.copy_(parameter.data)
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in other.items():
        torch.testing.assert_close(mine[name.replace(".default.weight", "")].grad, parameter.grad)
