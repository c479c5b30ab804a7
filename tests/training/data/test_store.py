"""The cache of tokenised samples: what is written is read back, and a folder that contradicts itself is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.store import COLUMNS, read_columns, write_columns

FACTS = {"source": "x.jsonl", "max_length": 8}


def piece(lengths: list[int], first: int = 0, **changes: Any) -> dict[str, Any]:
    total = sum(lengths)
    return {
        "ids": np.arange(first, first + total, dtype=np.int32),
        "trained": np.ones(total, bool),
        "lengths": np.asarray(lengths, np.int64),
        "targets": np.asarray(lengths, np.int32) - 1,
        "records": np.arange(len(lengths), dtype=np.int64),
        "dropped": np.zeros(len(lengths), np.int32),
        "seen": np.asarray([*lengths, 0], np.int32),
        "labels": [None] * len(lengths),
        "remarks": {"{count} records are odd": 1},
    } | changes


def test_the_pieces_of_a_source_become_one_and_come_back(tmp_path: Path) -> None:
    write_columns(tmp_path / "a", [piece([2, 3]), piece([4], first=50)], FACTS)
    found = read_columns(tmp_path / "a")
    assert found is not None
    assert len(found) == 3 and found.lengths.tolist() == [2, 3, 4] and found.offsets.tolist() == [0, 2, 5, 9]
    assert found.ids.tolist() == [0, 1, 2, 3, 4, 50, 51, 52, 53]
    assert found.left_out == 2 and found.remarks == {"{count} records are odd": 2}
    assert json.loads((tmp_path / "a" / "columns.json").read_text())["source"] == "x.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_labels_are_kept_once_in_the_order_of_their_coming(tmp_path: Path) -> None:
    write_columns(tmp_path / "a", [piece([1, 1], labels=["b", "a"]), piece([1, 1], labels=["b", 7])], FACTS)
    found = read_columns(tmp_path / "a")
    assert found is not None and found.labels == ["b", "a", 7] and found.classes.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ([9, 0], "1 had an answer longer than that and 1 had nothing to train"),
        ([9, 9], "2 had an answer longer than that"),
        ([0], "1 had nothing to train"),
        ([], "its records hold no text"),
    ],
)
def test_a_source_of_which_nothing_is_left_is_refused_with_its_reasons(
    tmp_path: Path, seen: list[int], why: str
) -> None:
    with pytest.raises(UsageError, match=rf"^x\.jsonl: no sample is left with data\.max_length 8: {why}$"):
        write_columns(tmp_path / "a", [piece([], seen=np.asarray(seen, np.int32))], FACTS)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_which_a_byte_has_turned_is_not_read(tmp_path: Path, name: str) -> None:
    write_columns(tmp_path / "a", [piece([2, 3])], FACTS)
    file = tmp_path / "a" / f"{name}.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_columns(tmp_path / "a") is None


def test_a_folder_without_facts_or_with_others_is_not_read_and_is_made_anew(tmp_path: Path) -> None:
    write_columns(tmp_path / "a", [piece([2, 3])], FACTS)
    facts = tmp_path / "a" / "columns.json"
    facts.write_text(facts.read_text().replace('"left_out": 1', '"left_out": 2'))
    assert read_columns(tmp_path / "a") is None
    facts.unlink()
    assert read_columns(tmp_path / "a") is None and read_columns(tmp_path / "none") is None
    write_columns(tmp_path / "a", [piece([4])], FACTS)
    found = read_columns(tmp_path / "a")
    assert found is not None and found.lengths.tolist() == [4]


def test_of_two_writers_of_one_source_the_first_one_counts(tmp_path: Path) -> None:
    write_columns(tmp_path / "a", [piece([2, 3])], FACTS)
    inode = (tmp_path / "a").stat().st_ino
    write_columns(tmp_path / "a", [piece([2, 3])], FACTS)
    assert (tmp_path / "a").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
