"""The held-out figures of a run: by their definitions, at any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_subspace.placement.collectives import world
from dist_subspace.training.data import eval_batches, eval_filler
from dist_subspace.training.evaluate import evaluate
from tests.ranks import run_on_ranks
from tests.training.data.tokens_for_tests import prepared
from tests.training.macro_f1 import macro_f1


class Guess(nn.Module):
    """The class that a sample's second character names, with a margin of 3."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=3.0 * nn.functional.one_hot(input_ids[:, 1] % 6, 6).float())


def measured(folder: str, count: int, micro_batch_size: int) -> dict[str, float]:
    """Collective: every sample's true class is known, and which one the model guesses."""
    rows = [{"text": f"{chr(59 + n % 4)}" + "x" * (n % 3), "label": n % 5 + 1} for n in range(count)]
    path = Path(folder) / f"{world().rank}"
    path.mkdir(exist_ok=True)
    (path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = prepared(path, train=str(path / "a.jsonl"), format="classification")
    settings = {"rank": world().rank, "world_size": world().size, "micro_batch_size": micro_batch_size}
    rounds = eval_batches(data.train, pad_id=2, **settings)
    return evaluate(Guess(), rounds, eval_filler(data.train, 2), torch.device("cpu"), 6)


def test_idle_ranks_change_no_metric(tmp_path: Path) -> None:
    """7 samples in micro-batches of 3: on two ranks two rounds, in the second of which one rank is idle."""
    true = [n % 5 + 1 for n in range(7)]
    predicted = [(59 + n % 4 - 28) % 6 for n in range(7)]
    expected = {
        "eval_loss": sum(math.log(5 + math.exp(3)) - 3 * (t == p) for t, p in zip(true, predicted)) / 7,
        "eval_accuracy": sum(t == p for t, p in zip(true, predicted)) / 7,
        "eval_f1": macro_f1(true, predicted),
    }
    assert 0 < expected["eval_accuracy"] < 1
    for found in [measured(str(tmp_path), 7, 3), *run_on_ranks(2, measured, str(tmp_path), 7, 3)]:
        assert found == pytest.approx(expected)
