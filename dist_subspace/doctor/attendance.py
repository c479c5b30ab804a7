"""Who came, who fell silent, and who came twice: rank 0's list of the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dist_subspace.doctor.examination import LIMIT, OTHERS_LATER
from dist_subspace.doctor.findings import ABSENT, Finding
from dist_subspace.doctor.meeting import Meeting
from dist_subspace.doctor.ranks import Facts, Ranks

KIND = "ranks"


class Attendance:
    """Rank 0: waits for each rank's facts for as long as it shows life.

    Arguments:
        patience: seconds for a rank to come. One that has come has the limit of the examination that it has begun, and a little.
    """

    def __init__(self, meeting: Meeting, patience: float) -> None:
        self._meeting, self._patience = meeting, patience
        self._began = time.monotonic()
        self._last: dict[int, tuple[Any, float]] = {}

    def gather(self) -> dict[int, Facts]:
        """The facts of all ranks that answer."""
        return self._meeting.gather("facts", range(self._meeting.size), lambda waiting: any(map(self._lives, waiting)))

    def _lives(self, rank: int) -> bool:
        """Whether a rank may still be on its way, or at an examination that it has begun not too long ago."""
        now = time.monotonic()
        if self._meeting.told("who", rank) is None:
            return now - self._began < self._patience
        stage = self._meeting.told("stage", rank)
        if rank not in self._last or self._last[rank][0] != stage:
            self._last[rank] = (stage, now)
        return now - self._last[rank][1] < (stage[1] if stage else LIMIT) + OTHERS_LATER


def judge(ranks: Ranks, meeting: Meeting, expected_host: Callable[[int], str | None], patience: float) -> list[Finding]:
    """The ranks that did not answer, that came twice, or that count otherwise."""
    found = []
    for rank in range(meeting.size):
        if rank not in ranks.facts:
            what, do = _silent(rank, meeting, expected_host(rank), patience)
            found.append(Finding(KIND, "", (rank,), what, do, ABSENT))
        elif ranks.facts[rank]["who"]["size"] != meeting.size:
            what = f"the rank counts {ranks.facts[rank]['who']['size']} ranks, and rank 0 {meeting.size}"
            found.append(Finding(KIND, "", (rank,), what, "give all ranks the same WORLD_SIZE", ABSENT))
        if (other := meeting.told("double", rank)) is not None:
            first = meeting.told("who", rank) or other
            what = f"two processes are rank {rank}: {first['pid']} on {first['host']} and {other['pid']} on {other['host']}"
            do = "start one process a rank, and give each run a MASTER_PORT of its own"
            found.append(Finding(KIND, "", (rank,), what, do, ABSENT))
    return found


def _silent(rank: int, meeting: Meeting, host: str | None, patience: float) -> tuple[str, str]:
    who, stage = meeting.told("who", rank), meeting.told("stage", rank)
    if who is None:
        on = f" of {meeting.size}{f', which should be on {host},' if host else ''}"
        do = "look whether it was started there, with the same MASTER_ADDR and MASTER_PORT, and whether its node reaches rank 0's"
        return f"rank {rank}{on} did not answer in {patience:g} seconds", f"{do}; --patience waits longer"
    what = f"rank {rank} on {who['host']} (process {who['pid']}) fell silent"
    what += f" at the examination of {stage[0]}" if stage else ""
    return what, "look there what became of the process: a library that crashes, a disk that does not answer"
