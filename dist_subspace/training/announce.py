"""What takes long at the start of a run says what it is, on a terminal and in a log file alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dist_subspace.report.quantities import clock_text
from dist_subspace.training.pulse import MINUTE, Pulse

SILENCE = 2.0  # seconds that may pass without a word


@contextmanager
def announced(
    what: str, say: Callable[[str], None], silence: float = SILENCE, over: bool = True, every: float = MINUTE
) -> Iterator[None]:
    """Within the block: say `what` goes on once it has taken `silence` seconds, again each `every` seconds, and then (`over`)
    also when it is done."""
    began, spoken = time.monotonic(), 0

    def speak() -> None:
        nonlocal spoken
        spoken += 1
        say(f"{what} ..." if spoken == 1 else f"{what} ... {clock_text(time.monotonic() - began)} so far")

    pulse = Pulse(speak, silence, every)
    try:
        yield
    finally:
        pulse.close()
    if spoken and over:
        say(f"{what}: done in {time.monotonic() - began:.1f} s")
