"""What takes long at the start of a run says what it is, on a terminal and in a log file alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENCE = 5.0  # seconds that may pass without a word


@contextmanager
def announced(what: str, say: Callable[[str], None], silence: float = SILENCE, over: bool = True) -> Iterator[None]:
    """Within the block: say `what` goes on once it has taken `silence` seconds, and then (`over`) also when it is done."""
    began, said = time.monotonic(), threading.Event()

    def speak() -> None:
        said.set()
        say(f"{what} ...")

    timer = threading.Timer(silence, speak)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if said.is_set() and over:
        say(f"{what}: done in {time.monotonic() - began:.1f} s")
