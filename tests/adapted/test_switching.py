"""A model with one adapter gets the values of another, and says what that one says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from tests.interchange.trained import frozen, trained
from tests.tiny_models import logits, tiny_model


def test_each_adapter_says_what_it_says_alone_and_what_is_unlike_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    made = {}
    for name, scale, more in (
        ("a", 1.0, {}),
        ("b", -3.0, {}),
        ("wider", 1.0, {"rank": 5, "alpha": 6.0}),
        ("bolder", 1.0, {"alpha": 9.0}),
    ):
        model = trained(frozen(tmp_path / "base"), **more)
        with torch.no_grad():
            for parameter in dsub.trainable_parameters(model):
                parameter.mul_(scale)
        made[name] = logits(model)
        dsub.save_adapter(model, tmp_path / name)
    model = dsub.load_adapter(frozen(tmp_path / "base"), tmp_path / "a")
    assert torch.equal(logits(dsub.switch_adapter(model, tmp_path / "b")), made["b"])
    for name, said in (("wider", "has .*lora_A.weight as"), ("bolder", "has alpha 9.0, and the model's")):
        with pytest.raises(UsageError, match=said):
            dsub.switch_adapter(model, tmp_path / name)
    assert torch.equal(logits(model), made["b"]), "the model has its former adapter"
    assert torch.equal(logits(dsub.switch_adapter(model, tmp_path / "a")), made["a"])
    assert not torch.equal(made["a"], made["b"])
