"""What a person reads: lines for what differs, the worst finding first with what to do; and the same for programs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dist_subspace.doctor import kinds
from dist_subspace.doctor.findings import Finding, worst_first
from dist_subspace.doctor.ranks import Ranks, alike
from dist_subspace.doctor.report import as_json, as_text, table_rows
from dist_subspace.doctor.sizes import size
from tests.doctor.facts import ranks_of

LIMITS = {
    "open files": 65536,
    "locked memory": -1,
    "infiniband": [],
    "shm": {"total": 8 << 30, "free": 8 << 30, "writable": True},
}


def two_nodes(**changes: Any) -> Ranks:
    return ranks_of(
        "limits", [LIMITS, LIMITS, LIMITS | changes, LIMITS | changes], ["node1", "node1", "node2", "node2"]
    )


def test_the_worst_comes_first_and_what_does_not_break_comes_last() -> None:
    one, two = Finding("a", "", (1,), "", "", 20), Finding("a", "", (0,), "", "", 90)
    three, four = Finding("a", "", (0,), "", "", 95, breaks=False), Finding("a", "", (0,), "", "", 20)
    assert worst_first([three, one, four, two]) == [two, four, one, three]


def test_a_place_is_said_by_host_and_rank() -> None:
    ranks = two_nodes()
    assert [ranks.where(places) for places in ([0, 1, 2, 3], [2, 3], [0, 2], [1])] == [
        "everywhere",
        "node2 (ranks 2, 3)",
        "node1, node2 (ranks 0, 2)",
        "node1 (rank 1)",
    ]
    assert ranks.where([7]) == "rank 7" and ranks.firsts() == {"node1": 0, "node2": 2}


def test_equal_values_are_one_line_and_different_ones_are_told_apart() -> None:
    assert ("limits", "open files", "", "65,536") in table_rows(two_nodes())
    lines = table_rows(two_nodes(**{"open files": 1024}))
    assert ("limits", "open files", "node1 (ranks 0, 1)", "65,536") in lines
    assert ("limits", "open files", "node2 (ranks 2, 3)", "1,024") in lines
    assert alike({0: "b", 1: "a", 2: "a"}) == [("a", [1, 2]), ("b", [0])]


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_fits_its_width_and_ends_with_the_verdict(width: int) -> None:
    ranks = two_nodes(shm={"total": 1 << 20, "free": 1 << 20, "writable": True})
    text = as_text(ranks, kinds.judge_all(ranks), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.splitlines()[0].startswith("dist-subspace doctor: 4 ranks on 2 nodes (node1, node2)")
    assert (
        "What will break, the worst first:\n  1. node2 (rank 2): /dev/shm has 1 MiB free" in text
        and "     -> mount it" in text
    )
    assert text.endswith("1 of these will break a run.")
    assert as_text(two_nodes(), [], width).endswith("Nothing was found that breaks a run.")


def test_programs_get_the_same_as_json() -> None:
    ranks = two_nodes(shm=None)
    told = json.loads(json.dumps(as_json(ranks, kinds.judge_all(ranks))))
    assert not told["healthy"] and told["answered"] == [0, 1, 2, 3] and told["nodes"]["node2"] == [2, 3]
    (found,) = told["findings"]
    assert (found["hosts"], found["breaks"], found["what"]) == (["node2"], True, "there is no /dev/shm") and found["do"]


def test_an_examination_that_came_to_no_end_is_a_finding_and_stops_no_other() -> None:
    ranks = ranks_of("limits", [LIMITS, LIMITS], storages=[{"failed": "OSError: x"}, {}])
    (found,) = kinds.judge_all(ranks)
    assert (
        found.breaks and found.ranks == (0,) and found.what == "the examination of storages came to no end: OSError: x"
    )


def test_bytes_in_words() -> None:
    assert [size(value) for value in (0, 100_000, 1 << 20, 1_600_000, 64 << 20, 3 << 30, 3 << 29)] == [
        *("0 KiB", "98 KiB", "1 MiB", "1.5 MiB", "64 MiB", "3 GiB", "1.5 GiB"),
    ]
