"""Losses of single samples: those of torch on the model's own logits, wherever the loss is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import dist_subspace as dsub
from dist_subspace.training.data import eval_batches
from dist_subspace.training.loss import forward, micro_batch_loss, whole_logits_because
from dist_subspace.training.sample_results import sample_results
from tests.tiny_run import make_model, make_tokenizer
from tests.training.data.tokens_for_tests import prepared

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), layers=1)


def batch_of(tmp_path: Path) -> Any:
    rows = ["" if n == 1 else "ab" * n for n in range(4)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "p{row}", "completion": "{row}"}}\n' for row in rows))
    table = prepared(tmp_path, make_tokenizer(), train=str(file), format="completion").train
    return next(iter(eval_batches(table, rank=0, world_size=1, micro_batch_size=4, pad_id=1)))


def with_trained_head(model: Any) -> Any:
    model = dsub.attach(model, dsub.SubspaceConfig(rank=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def on_the_head(model: Any) -> Any:
    return dsub.attach(model, dsub.SubspaceConfig(rank=2, target_modules=["lm_head"]))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, None),
        ({"head_storage": "int8"}, None),  # whose rows come in pieces
        ({}, with_trained_head),
        ({}, on_the_head),  # whose loss is made of whole logits
    ],
    ids=["plain", "in pieces", "trained head", "whole logits"],
)
def test_losses_of_samples_are_those_of_torch(
    folder: Path, tmp_path: Path, options: dict[str, Any], change: Any
) -> None:
    model: Any = dsub.load_frozen(folder, "fp32", **options)
    model = model if change is None else change(model)
    batch = batch_of(tmp_path)
    assert (whole_logits_because(model, batch, CPU) is None) == (change is not on_the_head)
    found = sample_results(model, batch, CPU)
    with torch.no_grad():
        logits = forward(model, batch, CPU).double()
    expected = functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none").sum(1)
    assert found.losses == pytest.approx(expected.numpy(), rel=1e-5)
    assert (found.targets.tolist(), found.predicted) == ((batch.labels[:, 1:] >= 0).sum(1).tolist(), None)
    assert found.losses.sum() == pytest.approx(float(micro_batch_loss(model, batch, CPU).detach()), rel=1e-5)


def test_a_head_that_is_switched_off_is_the_bases(folder: Path, tmp_path: Path) -> None:
    """The loss was made in the trained copy before; what is known of that head holds no longer."""
    plain, batch = dsub.load_frozen(folder, "fp32"), batch_of(tmp_path)
    model = with_trained_head(dsub.load_frozen(folder, "fp32"))
    before = sample_results(model, batch, CPU).losses
    with dsub.disabled(model):
        assert sample_results(model, batch, CPU).losses.tolist() == sample_results(plain, batch, CPU).losses.tolist()
    assert sample_results(model, batch, CPU).losses.tolist() == before.tolist()
