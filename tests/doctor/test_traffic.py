"""Collectives are really made, timed and checked; pairs that are slow beside the others are named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dist_subspace.doctor.command import largest_whole
from dist_subspace.doctor.traffic import judge, rounds
from tests.doctor.facts import ranks_of, sentences


@pytest.mark.parametrize("count", [2, 3, 8, 9, 12])
def test_every_pair_of_nodes_is_measured_once_and_no_node_twice_at_a_moment(count: int) -> None:
    nodes = list(range(0, 10 * count, 10))
    made = list(rounds(nodes))
    assert sorted(pair for together in made for pair in together) == list(itertools.combinations(nodes, 2))
    for together in made:
        members = [node for pair in together for node in pair]
        assert len(members) == len(set(members))
    assert count > 8 or all(len(together) == 1 for together in made)


def speed(value: float) -> dict[str, Any]:
    one = {"bytes": 1, "seconds": 1.0, "bandwidth": value, "latency": 1e-5}
    return {"all_reduce": one, "all_gather": one}


def test_a_pair_that_is_much_slower_than_most_is_a_remark() -> None:
    pairs = {"0-1": speed(1e9), "0-2": speed(1e8), "1-2": speed(1e9)}
    facts = {"backend": "gloo", "size": 3, "group": speed(1e9), "pairs": pairs}
    ranks = ranks_of("traffic", [facts] * 3)
    assert sentences(ranks, judge(ranks), breaks=True) == []
    assert sentences(ranks, judge(ranks)) == [
        "node1, node3 (ranks 0, 2): between node1 and node3 go 100.0 MB/s, and 1.00 GB/s between most nodes"
    ]


def test_a_collective_that_gives_other_numbers_breaks() -> None:
    facts = {
        "backend": "nccl",
        "size": 2,
        "group": {"error": "an all-reduce gave 4.0, and the sum is 3.0"},
        "pairs": {},
    }
    ranks = ranks_of("traffic", [facts])
    assert sentences(ranks, judge(ranks), breaks=True) == [
        "node1: a collective of its group is wrong: an all-reduce gave 4.0, and the sum is 3.0"
    ]


def test_nodes_that_do_not_reach_the_others_are_left_out_of_the_group() -> None:
    closed, open_ = {"ports": {"1": "timed out"}}, {"ports": {"1": None}}
    links = {a: {str(b): open_ for b in range(4) if b != a} for a in range(4)}
    assert largest_whole([0, 1, 2, 3], links) == [0, 1, 2, 3]
    links[3] = {str(b): closed for b in range(3)}
    assert largest_whole([0, 1, 2, 3], links) == [0, 1, 2]
    links[1]["2"] = closed
    assert largest_whole([0, 1, 2, 3], links) == [0, 1]


def test_nodes_that_are_not_reached_by_the_others_are_left_out() -> None:
    """A firewall on one node: it reaches all, and none reaches it."""
    closed, open_ = {"ports": {"1": "timed out"}}, {"ports": {"1": None}}
    links = {a: {str(b): closed if b == 1 else open_ for b in range(4) if b != a} for a in range(4)}
    assert largest_whole([0, 1, 2, 3], links) == [0, 2, 3]
