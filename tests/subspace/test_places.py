"""A layer keeps its places and its hooks when a method takes its place: shared layers, hooks, weights that are made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, weight_norm

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from tests.tiny_models import logits, tiny_inputs, tiny_model

METHODS = {"lora": {"rank": 2}, "dora": {"rank": 2}, "ssl": {}, "houlsby": {}}
Model = Any


def _one_projection(model: Model) -> None:
    """The first block's output projection in both blocks, with a bias."""
    first, second = (block.attention for block in model.bert.encoder.layer)
    second.output.dense = first.output.dense


def _two_names(model: Model) -> None:
    """One layer under two names of a module."""
    attention = model.bert.encoder.layer[0].attention.self
    attention.value = attention.query


def _tripled(model: Model) -> None:
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda module, inputs, y: 3 * y)


def _scaled_input(model: Model) -> None:
    model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def _in_place(model: Model) -> None:
    model.bert.encoder.layer[0].attention.self.key.register_forward_hook(lambda module, inputs, y: y.mul_(0.5))


CHANGES: dict[str, Callable[[Model], None]] = {
    "one projection in two blocks": _one_projection,
    "one layer under two names": _two_names,
    "a hook on an output": _tripled,
    "a hook on an input": _scaled_input,
    "a hook that changes the output in place": _in_place,
}


def changed(change: Callable[[Model], None]) -> Model:
    model = tiny_model("BertForSequenceClassification")
    change(model)
    return model


def set_at_random(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in dsub.trainable_parameters(model):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CHANGES)
def test_a_method_starts_at_what_the_model_computes_and_disabled_goes_back_to_it(case: str, method: str) -> None:
    expected = logits(changed(CHANGES[case]))
    model = dsub.attach(changed(CHANGES[case]), dsub.SubspaceConfig(method=method, **METHODS[method]))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    set_at_random(model)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with dsub.disabled(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CHANGES)
def test_what_was_trained_acts_in_every_place_of_the_layer(case: str) -> None:
    model = dsub.attach(changed(CHANGES[case]), dsub.SubspaceConfig(method="lora", rank=2, alpha=3))
    set_at_random(model)
    by_hand = changed(CHANGES[case])  # W + B A, put in by hand
    for name, layer in by_hand.named_modules():
        part = model.get_submodule(name)
        if hasattr(part, "lora_A"):
            layer.weight.data += 1.5 * part.lora_B.data @ part.lora_A.data
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-4, atol=1e-5)


def test_a_hook_is_taken_away_by_its_handle() -> None:
    model = tiny_model("BertForSequenceClassification")
    expected = logits(model)
    handle = model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda module, inputs, y: 3 * y)
    dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=2))
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    handle.remove()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_see_what_they_saw_of_the_layer_itself(method: str) -> None:
    """Gradients of a full backward hook; keyword arguments of hooks that ask for them; a hook that is called after an error."""

    def seen(attached: bool) -> dict[str, list[Any]]:
        model = tiny_model("BertForSequenceClassification")
        layer, found = model.bert.encoder.layer[1].intermediate.dense, dict[str, list[Any]]()
        layer.register_full_backward_hook(lambda m, ins, outs: found.setdefault("gradients", []).extend((*ins, *outs)))
        layer.register_forward_hook(
            lambda m, args, kwargs, y: found.setdefault("forward", []).extend((*args, kwargs, y)), with_kwargs=True
        )
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: found.setdefault("before", []).extend((*args, kwargs)), with_kwargs=True
        )
        layer.register_forward_hook(lambda m, args, y: found.setdefault("always", []).append(y), always_call=True)
        if attached:
            dsub.attach(model, dsub.SubspaceConfig(method=method, **METHODS[method]))
        model(**tiny_inputs(model, labels=True)).loss.backward()
        with pytest.raises(RuntimeError):
            model.bert.encoder.layer[1].intermediate.dense(torch.ones(1, 3))
        return found

    plain, ours = seen(False), seen(True)
    assert plain.keys() == ours.keys() == {"gradients", "forward", "before", "always"}
    for name, values in plain.items():
        for one, other in zip(values, ours[name], strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
            else:
                assert one == other, name


def test_a_shared_module_that_is_trained_in_full_is_trained_in_every_place() -> None:
    model = changed(_one_projection)
    config = dsub.SubspaceConfig(
        method="lora", rank=2, target_modules=["query"], modules_to_save=["attention.output.dense"]
    )
    dsub.attach(model, config)
    first, second = (block.attention.output.dense for block in model.bert.encoder.layer)
    assert first is second
    assert "TrainedCopy" in type(first).__name__


def _normalised(layer: nn.Module) -> None:
    weight_norm(layer)


def _pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def _another_forward(layer: nn.Module) -> None:
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * super().forward(input)


def _another_call(layer: nn.Module) -> None:
    layer.__class__ = Scaled


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [_normalised, _pruned, _another_forward, _another_call])
def test_a_layer_whose_weight_or_forward_is_made_otherwise_is_left_alone(make: Callable[[nn.Module], None]) -> None:
    def made() -> Model:
        model = tiny_model("BertForSequenceClassification")
        make(model.bert.encoder.layer[0].output.dense)
        return model

    expected = logits(made())
    with pytest.warns(UserWarning, match=r"left out of all-linear: bert\.encoder\.layer\.0\.output\.dense"):
        model = dsub.attach(made(), dsub.SubspaceConfig(method="lora", rank=2))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="no method can be put on it"):
        dsub.attach(made(), dsub.SubspaceConfig(method="lora", rank=2, target_modules=["layer.0.output.dense"]))
