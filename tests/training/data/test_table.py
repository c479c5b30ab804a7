"""Samples of several sources under one numbering, and the records of them that are held out."""

from __future__ import annotations

import numpy as np
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.store import Columns
from dist_subspace.training.data.table import Part, TokenTable, hold_out, whole_table


def columns(lengths: list[int], first: int = 0, records: list[int] | None = None) -> Columns:
    """Samples of these lengths whose tokens count upwards from `first`; all but every third are targets."""
    total, count = sum(lengths), len(lengths)
    ids = np.arange(first, first + total, dtype=np.int32)
    zeros = np.zeros(count, np.int32)
    return Columns(
        ids=ids,
        trained=ids % 3 != 0,
        offsets=np.cumsum([0, *lengths]),
        targets=np.arange(count, dtype=np.int32),
        records=np.arange(count) if records is None else np.asarray(records),
        classes=np.arange(count, dtype=np.int32) % 2,
        dropped=zeros,
        seen=zeros,
        labels=["a", "b"],
        remarks={},
    )


def test_samples_are_numbered_source_after_source() -> None:
    table = whole_table([columns([2, 3]), columns([4], first=100)], [1.0, 2.0], [None, None])
    assert len(table) == 3 and table.shares == [(2, 1.0), (1, 2.0)] and not table.classification
    assert table.lengths.tolist() == [2, 3, 4] and table.target_counts.tolist() == [0, 1, 0]
    assert [table.sample(i)[0].tolist() for i in range(3)] == [[0, 1], [2, 3, 4], [100, 101, 102, 103]]


def test_labels_are_the_targets_and_never_the_first_token() -> None:
    table = whole_table([columns([2, 3], first=1)], [1.0], [None])
    ids, labels = table.sample(1)
    assert ids.tolist() == [3, 4, 5] and labels.tolist() == [-100, 4, 5]
    assert table.sample(0)[1].tolist() == [-100, 2]
    assert ids.dtype == labels.dtype == np.int64


def test_a_sample_to_classify_has_one_label_its_class() -> None:
    table = whole_table([columns([2, 3, 2])], [1.0], [np.array([7, 9])])
    assert table.classification
    assert [table.sample(i)[1].tolist() for i in range(3)] == [[7], [9], [7]]


def test_rows_that_are_left_out_leave_the_others_as_they_are() -> None:
    part = Part(columns([2, 3, 4]), np.array([0, 2]))
    table = TokenTable((part, Part(columns([5], first=50), np.array([0]))))
    assert len(table) == 3 and table.lengths.tolist() == [2, 4, 5]
    assert table.sample(1)[0].tolist() == [5, 6, 7, 8] and table.sample(2)[0][0] == 50


def tokens(table: TokenTable) -> list[int]:
    return sorted(int(token) for i in range(len(table)) for token in table.sample(i)[0])


def test_the_samples_of_a_record_are_held_out_together_and_weigh_one_each() -> None:
    source = columns([1] * 12, records=[n // 3 for n in range(12)])
    training, evaluation = hold_out(whole_table([source], [3.0], [None]), 0.5, seed=1, by_sample=[False])
    assert (len(training), len(evaluation)) == (6, 6)
    assert sorted(tokens(training) + tokens(evaluation)) == list(range(12))
    assert {token // 3 for token in tokens(training)}.isdisjoint(token // 3 for token in tokens(evaluation))
    assert training.shares == [(6, 3.0)] and evaluation.shares == [(6, 1.0)]


def test_the_pieces_of_one_document_are_drawn_one_by_one_and_another_seed_draws_others() -> None:
    table = whole_table([columns([1] * 20, records=[0] * 20)], [1.0], [None])
    drawn = [tokens(hold_out(table, 0.25, seed, by_sample=[True])[1]) for seed in (1, 1, 2)]
    assert len(drawn[0]) == 5 and drawn[0] == drawn[1] != drawn[2]


def test_records_of_two_sources_with_one_number_are_two_records() -> None:
    sources = [columns([1] * 3), columns([1] * 3, first=10)]
    training, evaluation = hold_out(whole_table(sources, [1.0, 1.0], [None, None]), 0.5, 0, [False, False])
    assert (len(training), len(evaluation)) == (3, 3)


def test_a_fraction_that_leaves_nothing_to_train_is_refused() -> None:
    table = whole_table([columns([1, 1])], [1.0], [None])
    assert [len(side) for side in hold_out(table, 0.01, 0, [False])] == [1, 1]  # at least one record
    with pytest.raises(UsageError, match=r"data\.eval is 0\.9, which leaves nothing to train on of 2 records"):
        hold_out(table, 0.9, 0, [False])
