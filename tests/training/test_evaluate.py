"""Metrics: values of scikit-learn's documentation, and of the definitions."""

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
from dist_subspace.training.evaluate import evaluate, scores
from tests.ranks import run_on_ranks
from tests.training.data.tokens_for_tests import prepared
from tests.training.macro_f1 import macro_f1


def counts(true: list[int], predicted: list[int], classes: int) -> Tensor:
    table = torch.zeros(classes, classes, dtype=torch.float64)
    for row, column in zip(true, predicted):
        table[row, column] += 1
    return table


@pytest.mark.parametrize(
    ("true", "predicted", "classes", "accuracy", "f1"),
    [
        # sklearn.metrics.f1_score, first example: macro 0.26... (4/15), accuracy 2/6
        ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 3, 1 / 3, 4 / 15),
        # sklearn.metrics.classification_report, first example: macro avg f1-score 0.49, accuracy 0.60
        ([0, 1, 2, 2, 2], [0, 0, 2, 2, 1], 3, 0.6, (2 / 3 + 0 + 0.8) / 3),
        # the same page, second example: classes 1, 2, 3 asked for; only 0 and 1 occur
        ([1, 1, 1], [1, 1, 0], 4, 2 / 3, (0.8 + 0) / 2),
        # labels 1 to 3, all of them right: class 0 does not occur
        ([1, 2, 3, 3], [1, 2, 3, 3], 4, 1.0, 1.0),
        # a class that is only predicted counts, one that is only true too
        ([1, 1, 2], [1, 3, 1], 5, 1 / 3, (0.5 + 0 + 0) / 3),
        # two classes: F1 of class 1, whatever class 0 is
        ([0, 0, 1, 1], [0, 1, 1, 1], 2, 0.75, 0.8),
        ([0, 0], [0, 0], 2, 1.0, 0.0),
        ([0, 0, 0], [0, 0, 0], 1, 1.0, 1.0),
    ],
)
def test_scores_are_those_of_scikit_learn(
    true: list[int], predicted: list[int], classes: int, accuracy: float, f1: float
) -> None:
    found = scores(counts(true, predicted, classes))
    assert found == {"eval_accuracy": pytest.approx(accuracy), "eval_f1": pytest.approx(f1)}
    if classes > 2:
        assert f1 == pytest.approx(macro_f1(true, predicted))


def test_macro_f1_is_its_definition_on_any_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (3, 5, 40):
        for size in (1, 7, 300):
            true, predicted = torch.randint(1, classes, (2, size), generator=generator).tolist()
            found = scores(counts(true, predicted, classes))
            assert found["eval_f1"] == pytest.approx(macro_f1(true, predicted))


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
