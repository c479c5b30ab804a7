"""Samples of a table of tokens, scored in batches that depend on them alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_subspace.evaluation import scoring
from dist_subspace.evaluation.samples import in_memory, table_of
from dist_subspace.evaluation.scoring import Batching, scores
from dist_subspace.placement.collectives import gather_objects
from dist_subspace.training.data.samples import Sample
from tests.ranks import run_on_ranks
from tests.training.data.tokens_for_tests import prepared

HOW = Batching(2, 0, 4, torch.device("cpu"))


class Counting(nn.Module):
    """Every token is as likely as its id says; keeps the batches that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[list[int]]] = []
        self.training = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert not self.training
        self.seen.append(input_ids.tolist())
        return SimpleNamespace(logits=torch.arange(9.0).expand(*input_ids.shape, 9))


def table() -> Any:
    rows = [Sample(list(range(1, 1 + size)), [False, *[True] * (size - 1)]) for size in (3, 6, 2, 5, 4)]
    return table_of(rows, [1, 2, 2, 3, 4])


def losses(number: int) -> float:
    """Of tokens 2 to the sample's last."""
    ids, _ = table().sample(number)
    of_each = torch.logsumexp(torch.arange(9.0), 0) - torch.tensor(ids[1:], dtype=torch.float)
    return float(of_each.double().sum())


def found_on_ranks() -> tuple[list[tuple[float, int]], list[list[list[int]]]]:
    model = Counting()
    found = scores(model, table(), [4, 0, 1, 3, 2], HOW)
    assert model.training
    return [(score.loss, score.targets) for score in found], [
        b for of_rank in gather_objects(model.seen) for b in of_rank
    ]


def test_scores_come_in_the_order_that_was_asked_for_at_any_number_of_ranks() -> None:
    alone, batches = found_on_ranks()
    assert alone == [(pytest.approx(losses(n)), len(table().sample(n)[0]) - 1) for n in (4, 0, 1, 3, 2)]
    for found, seen in run_on_ranks(2, found_on_ranks):
        assert found == alone  # to the last digit
        assert sorted(seen) == sorted([*batches, [[1, 2, 0, 0]]])  # a rank without a batch runs the shortest sample


def test_samples_in_memory_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n{"prompt": "d", "completion": "efg"}\n')
    data = prepared(tmp_path, train=str(tmp_path / "a.jsonl"), format="completion").train
    for limit, count in ((None, 2), (1, 1), (9, 2)):
        held = in_memory(data, limit)
        assert len(held) == count and not isinstance(held.parts[0].columns.ids, np.memmap)
        for number in range(count):
            for ours, theirs in zip(held.sample(number), data.sample(number)):
                assert ours.tolist() == theirs.tolist()
        assert held.target_counts.tolist() == data.target_counts[:count].tolist()


def test_classes_in_memory_are_ids(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,b\ny,a\nz,b\n")
    held = in_memory(prepared(tmp_path, train=str(tmp_path / "a.csv"), format="classification").train)
    assert held.classification and [int(held.sample(n)[1][0]) for n in range(3)] == [1, 0, 1]
    assert scoring.Score(1.0, 1, 2).predicted == 2
