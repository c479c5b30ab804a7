"""The labels of records to classify: their names, and the ids that these have in training and evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.labels import class_ids, label_names, label_of
from dist_subspace.training.data.settings import DataSettings
from dist_subspace.training.data.store import Columns

EMPTY = np.zeros(0, np.int32)
NOTHING = Columns(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, [], {})


def with_labels(*labels: str | int) -> Columns:
    return dataclasses.replace(NOTHING, labels=list(labels))


def row(label: Any) -> Row:
    return Row({"text": "a", "label": label}, 3, "x.csv", DataSettings(train="x.csv", format="classification"))


@pytest.mark.parametrize(
    ("given", "read"), [("a", "a"), (3, 3), (3.0, 3), (True, "true"), (False, "false"), ("01", "01")]
)
def test_a_label_is_read_as_it_is_meant(given: Any, read: str | int) -> None:
    found = label_of(row(given))
    assert found == read and type(found) is type(read)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (" ", "record 3 has a blank label"),
        (1.5, r"has the label 1\.5: .* \(regression\) is not trained; accepted: text or an integer"),
        ([1], "has list as label"),
    ],
)
def test_a_label_that_is_none_is_refused_with_its_record(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        label_of(row(given))


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ([["b", "a"], ["c", "a"]], ["a", "b", "c"]),
        ([[2, 0]], ["0", "1", "2"]),  # ids as they stand: 1 is a class that nobody has seen
        ([["2", "0"]], ["0", "1", "2"]),
        ([[1], ["1", "0"]], ["0", "1"]),
        ([["01", "1"]], ["01", "1"]),
        ([[-1, 1]], ["-1", "1"]),
        ([[10, "x"]], ["10", "x"]),
        ([["9" * 19]], ["9" * 19]),  # a code
        ([["٣"]], ["٣"]),
    ],
    ids=str,
)
def test_the_names_in_the_order_of_their_ids(parts: list[list[str | int]], names: list[str]) -> None:
    assert label_names([with_labels(*part) for part in parts]) == names


def test_an_id_beyond_all_reason_is_refused() -> None:
    assert len(label_names([with_labels(99_999)])) == 100_000
    with pytest.raises(UsageError, match=r"the largest label is 100000; accepted: class ids below 100000, or text"):
        label_names([with_labels(100_000)])


def test_each_label_has_the_id_of_its_name_and_a_new_one_is_refused() -> None:
    names = ["no", "so", "yes"]
    found = class_ids(with_labels("yes", "no"), names, "eval.csv")
    assert found.tolist() == [2, 0] and found.dtype == np.int64
    assert class_ids(with_labels(1, "0"), ["0", "1"], "eval.csv").tolist() == [1, 0]
    with pytest.raises(UsageError, match=r"eval\.csv has the label 'never', which .* has not \(there: no, so, yes\)"):
        class_ids(with_labels("never"), names, "eval.csv")
    with pytest.raises(UsageError, match=r"\(there: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        class_ids(with_labels("x"), [str(n) for n in range(9)], "eval.csv")
