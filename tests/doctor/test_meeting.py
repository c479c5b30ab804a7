"""The meeting goes on without those who are absent, silent or come twice, and names them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dist_subspace.doctor import attendance
from dist_subspace.doctor.attendance import Attendance
from dist_subspace.doctor.meeting import Meeting, NotHeard, OwnStore
from dist_subspace.doctor.ranks import Ranks
from tests.doctor.facts import who


def sign(meeting: Meeting, host: str) -> dict[str, Any] | None:
    return meeting.sign(who(host, meeting.rank, meeting.size))


def three() -> list[Meeting]:
    """Of one process's store."""
    store = OwnStore()
    return [Meeting(store, rank, 3) for rank in range(3)]


def test_what_is_told_reaches_rank_0_and_what_it_decides_reaches_all() -> None:
    first, second, _ = three()
    second.tell("facts", {"a": [1]})
    assert first.gather("facts", [1, 2], lambda waiting: False) == {1: {"a": [1]}}
    first.announce("plan", {"ranks": [0, 1]})
    assert second.hear("plan", 1.0) == {"ranks": [0, 1]}
    with pytest.raises(NotHeard):
        second.hear("verdict", 0.1)


def test_the_second_of_two_with_one_number_is_told_of_the_first() -> None:
    first, second, _ = three()
    again = Meeting(first.store, 1, 3)
    assert sign(second, "node2") is None and sign(second, "node2") is None
    assert sign(again, "node9") == who("node2", 1, 3)


def test_a_rank_that_never_comes_is_not_waited_for_beyond_the_patience() -> None:
    meetings = three()
    for meeting in meetings[:2]:
        sign(meeting, "node1")
        meeting.tell("facts", {"who": who("node1", meeting.rank, 3)})
    began = time.monotonic()
    found = Attendance(meetings[0], patience=0.5).gather()
    assert list(found) == [0, 1] and 0.4 < time.monotonic() - began < 10
    ranks = Ranks(found, 3)
    (absent,) = attendance.judge(ranks, meetings[0], lambda rank: f"node{rank + 1}", 0.5)
    assert absent.what == "rank 2 of 3, which should be on node3, did not answer in 0.5 seconds" and absent.breaks
    assert (
        attendance.judge(ranks, meetings[0], lambda rank: None, 0.5)[0].what
        == "rank 2 of 3 did not answer in 0.5 seconds"
    )


def test_a_rank_that_came_is_waited_for_while_it_goes_on_and_named_when_it_falls_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attendance, "OTHERS_LATER", 0.2)
    first, second, third = three()
    for meeting in (first, second, third):
        sign(meeting, f"node{meeting.rank + 1}")
    for meeting in (first, second):
        meeting.tell("facts", {"who": who("node", meeting.rank, 3)})
    third.tell("stage", ["disks", 0.5])
    began = time.monotonic()
    found = Attendance(first, patience=0.0).gather()
    assert list(found) == [0, 1] and 0.6 < time.monotonic() - began < 10
    (silent,) = attendance.judge(Ranks(found, 3), first, lambda rank: None, 0.0)
    assert silent.what == "rank 2 on node3 (process 1002) fell silent at the examination of disks"


def test_a_rank_with_another_number_of_ranks_and_a_second_process_of_one_number_are_named() -> None:
    first, second, _ = three()
    for meeting in (first, second):
        sign(meeting, "node1")
    second.tell("double", who("node9", 1, 3))
    facts = {rank: {"who": who("node1", rank, 2 if rank == 1 else 3)} for rank in range(3)}
    said = [found.what for found in attendance.judge(Ranks(facts, 3), first, lambda rank: None, 1.0)]
    assert said == [
        "the rank counts 2 ranks, and rank 0 3",
        "two processes are rank 1: 1001 on node1 and 1001 on node9",
    ]
