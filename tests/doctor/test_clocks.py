"""A clock is compared with rank 0's over the store, and one that is away by more than what can be measured is named."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from dist_subspace.doctor import clocks
from dist_subspace.doctor.meeting import Meeting
from tests.doctor.facts import ranks_of, sentences


@pytest.fixture
def meetings() -> Iterator[tuple[Meeting, Meeting]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    other = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    yield Meeting(store, 0, 2), Meeting(other, 1, 2)


def test_one_clock_is_the_same_as_itself_within_the_round_trip(meetings: tuple[Meeting, Meeting]) -> None:
    first, second = meetings
    serving = threading.Thread(target=clocks.serve, args=(first, [1]))
    serving.start()
    found = clocks.ask(second, 0)
    serving.join(30)
    assert found is not None and abs(found["ahead"]) <= found["error"] < 1.0


def test_a_rank_that_does_not_ask_is_left(meetings: tuple[Meeting, Meeting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "PATIENCE", 0.2)
    clocks.serve(meetings[0], [1])
    assert clocks.ask(meetings[1], 0) is None


@pytest.mark.parametrize(
    ("ahead", "error", "breaking", "remarks"),
    [
        (0.2, 0.001, [], []),
        (-2.0, 0.001, [], ["node2 (rank 1): the clock is 2.0 seconds behind that of node1"]),
        (7200.0, 0.001, ["node2 (rank 1): the clock is 2.0 hours ahead of that of node1"], []),
        (8.0, 10.0, [], []),  # a round trip too long to tell
    ],
)
def test_what_is_far_away_breaks(ahead: float, error: float, breaking: list[str], remarks: list[str]) -> None:
    ranks = ranks_of("clock", [None, {"ahead": ahead, "error": error}])
    assert sentences(ranks, clocks.judge(ranks), breaks=True) == breaking
    assert sentences(ranks, clocks.judge(ranks), breaks=False) == remarks
