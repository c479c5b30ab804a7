"""The reference is the model as the run begins, of the same weights, for methods that change the base's bytes too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.config import load_config
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training.preferences.reference import Reference, begins_with_more, needs_beginning
from tests.tiny_models import logits, tiny_model


def moved(model: Any) -> None:
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.2 * torch.randn_like(parameter))


def model_with(folder: Any, method: str) -> tuple[Tensor, Any]:
    """The base's own logits, and the model with a method attached."""
    tiny_model("LlamaForCausalLM").save_pretrained(folder)
    model = load_frozen(folder, storage="fp32")
    alone = logits(model)
    return alone, attach(model, SubspaceConfig(method=method, rank=2))


@pytest.mark.parametrize("method", ["lora", "pissa", "olora", "dora", "ia3"])
def test_it_is_the_base_as_it_was(method: str, tmp_path: Any) -> None:
    alone, model = model_with(tmp_path, method)
    reference = Reference(model, of_start=False)
    moved(model)
    trained = logits(model)
    with reference.asked():
        torch.testing.assert_close(logits(model), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, alone, atol=1e-3) and torch.equal(logits(model), trained)


def test_it_is_the_adapter_that_the_run_began_with(tmp_path: Any) -> None:
    alone, model = model_with(tmp_path, "lora")
    moved(model)
    begun, reference = logits(model), Reference(model, of_start=True)
    moved(model)
    trained, values = logits(model), [p.detach().clone() for p in trainable_parameters(model)]
    with pytest.raises(KeyError), reference.asked():
        assert torch.equal(logits(model), begun)
        raise KeyError
    assert torch.equal(logits(model), trained) and not torch.allclose(begun, alone, atol=1e-3)
    assert all(torch.equal(p, value) for p, value in zip(trainable_parameters(model), values, strict=True))


def test_an_adapter_and_new_tokens_are_more_than_the_base() -> None:
    base = {"model": {"path": "m"}, "data": {"train": "a.jsonl", "format": "preference"}}
    plain, begun, tokens = (
        load_config(base, ["training.objective=dpo", *more])
        for more in ([], ["subspace.init_from=x"], ["model.new_tokens=[<a>]"])
    )
    assert [begins_with_more(config) for config in (plain, begun, tokens)] == [False, True, True]
    assert [needs_beginning(config) for config in (plain, begun, tokens)] == [False, True, False]
