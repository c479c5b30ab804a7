"""A sum of adapters computes the base with the weighted sum of what PEFT merges of each, and is made from files alone."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import dist_subspace as dsub
from dist_subspace.api import load_adapted
from dist_subspace.errors import UsageError
from tests.interchange.trained import frozen, trained
from tests.tiny_models import logits, tiny_model

WEIGHTS = {"a": 0.7, "b": -0.4}


def adapters(folder: Path, second: str = "lora", rank: int = 3) -> dict[str, Path]:
    tiny_model().save_pretrained(folder / "base")
    made = {}
    for name, method, seed in (("a", "lora", 0), ("b", second, 3)):
        model = trained(frozen(folder / "base"), method, rank=rank if method == "lora" else 4, seed=seed)
        with torch.no_grad():
            for parameter in dsub.trainable_parameters(model):
                parameter.mul_(1 + seed)
        made[name] = dsub.save_adapter(model, folder / name)
    return made


@pytest.mark.parametrize("rank", [3, 20])
def test_the_sum_computes_the_weighted_sum_of_what_peft_merges(rank: int, tmp_path: Path) -> None:
    """Twice rank 20 is above the smaller side of most layers."""
    made = adapters(tmp_path, rank=rank)
    out = dsub.combine_adapters({made[name]: weight for name, weight in WEIGHTS.items()}, tmp_path / "sum")
    expected = tiny_model()
    updates = {}
    for name, weight in WEIGHTS.items():
        alone = peft.PeftModel.from_pretrained(tiny_model(), made[name]).merge_and_unload()
        for key, parameter in alone.named_parameters():
            updates[key] = updates.get(key, 0) + weight * (parameter.detach() - dict(expected.named_parameters())[key])
    with torch.no_grad():
        for key, parameter in expected.named_parameters():
            parameter.add_(updates[key])
    seen = load_adapted(out)
    assert torch.allclose(logits(seen), logits(expected.eval()), atol=2e-5)
    read = peft.PeftModel.from_pretrained(tiny_model(), out).eval()
    assert torch.allclose(logits(read), logits(seen), atol=2e-5), "PEFT reads it too"


def test_adapters_of_other_methods_add_up_where_they_are_thin_matrices(tmp_path: Path) -> None:
    made = adapters(tmp_path, second="rslora")
    one = dsub.combine_adapters({made["b"]: 1.0}, tmp_path / "one")
    assert torch.allclose(logits(load_adapted(one)), logits(load_adapted(made["b"])), atol=2e-5)


def test_what_does_not_add_up_is_refused(tmp_path: Path) -> None:
    made = adapters(tmp_path, second="ssb")
    cases = [
        ({}, "weights is empty"),
        ({made["a"]: float("nan")}, "the weight of .* is nan; accepted: a finite number"),
        ({made["a"]: 1.0, made["b"]: 1.0}, "is of method ssb, whose update of .* is no product of thin matrices"),
    ]
    for weights, said in cases:
        with pytest.raises(UsageError, match=said):
            dsub.combine_adapters(weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    other = dsub.save_adapter(trained(frozen(tmp_path / "other")), tmp_path / "c")
    with pytest.raises(UsageError, match="is of another base than"):
        dsub.combine_adapters({made["a"]: 1.0, other: 1.0}, tmp_path / "out")
