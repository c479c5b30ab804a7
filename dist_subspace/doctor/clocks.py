"""How far the nodes' clocks are apart: rank 0's time, asked for over the store, beside the middle of the round trip."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from dist_subspace.doctor.findings import CLOCK, Finding
from dist_subspace.doctor.meeting import Meeting
from dist_subspace.doctor.ranks import Ranks

KIND = "clock"
ASKED = 5  # times; the shortest round trip counts
PATIENCE = 10.0  # seconds for one round trip
# torchrun takes a node for dead whose signs of life, every 5 seconds, look 15 seconds old; certificates and tickets of network
# disks allow some minutes.
APART, REMARKABLE = 5.0, 1.0  # seconds


def serve(meeting: Meeting, ranks: Iterable[int]) -> None:
    """Rank 0: answer each of the ranks, one after another; one that does not ask is left."""
    for rank in ranks:
        try:
            for turn in range(ASKED):
                meeting.wait_for_value(f"clock/{rank}/{turn}/asked", PATIENCE)
                meeting.set_value(f"clock/{rank}/{turn}/answer", repr(time.time()))
        except Exception:  # the asker has ended, and is missed elsewhere
            continue


def ask(meeting: Meeting, turns_before: int) -> dict[str, float] | None:
    """Another rank: by how many seconds this clock is ahead of rank 0's, and at most how wrong that is."""
    best: tuple[float, float] | None = None
    try:
        for turn in range(ASKED):
            before = time.time()
            meeting.set_value(f"clock/{meeting.rank}/{turn}/asked", "1")
            answer = float(meeting.wait_for_value(f"clock/{meeting.rank}/{turn}/answer", PATIENCE * (turns_before + 1)))
            after = time.time()
            if best is None or after - before < best[0]:
                best = (after - before, (before + after) / 2 - answer)
    except Exception:  # rank 0 has ended, or did not come to it in time
        return None
    assert best is not None
    return {"ahead": best[1], "error": best[0] / 2}


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    shown = {rank: _text(found) for rank, found in ranks.of(KIND).items()}
    if shown:
        yield "beside rank 0's", shown


def judge(ranks: Ranks) -> Iterator[Finding]:
    for rank, found in ranks.of(KIND).items():
        away = abs(found["ahead"]) - found["error"]
        if away < REMARKABLE:
            continue
        yield Finding(
            kind=KIND,
            about="beside rank 0's",
            ranks=(rank,),
            what=f"the clock is {_seconds(found['ahead'])} {'ahead of' if found['ahead'] > 0 else 'behind'} that of "
            f"{ranks.host(0) if 0 in ranks.facts else 'rank 0'}",
            do="set the clock, and let chrony or ntpd keep it",
            badness=CLOCK,
            breaks=away >= APART,
        )


def _text(found: dict[str, float]) -> str:
    if abs(found["ahead"]) <= max(found["error"], 0.0005):
        return f"the same within {max(found['error'], 0.001) * 1000:.0f} ms"
    return f"{_seconds(found['ahead'])} {'ahead' if found['ahead'] > 0 else 'behind'}"


def _seconds(value: float) -> str:
    size = abs(value)
    if size < 1:
        return f"{size * 1000:.0f} ms"
    return f"{size:.1f} seconds" if size < 600 else f"{size / 3600:.1f} hours"
