"""A word where nobody else has spoken for a while: a long silence and a hang look alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

MINUTE = 60.0  # seconds


class Pulse:
    """Calls `speak` on a thread of its own, once nobody has called `touch` for `first` seconds, and then each `every` seconds."""

    def __init__(self, speak: Callable[[], None], first: float = MINUTE, every: float = MINUTE) -> None:
        self._speak, self._every = speak, every
        self._due = time.monotonic() + first
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def touch(self) -> None:
        """Something was said: the next word is due later."""
        self._due = time.monotonic() + self._every

    def close(self) -> None:
        """From now on nothing is said."""
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._over.wait(min(max(0.0, self._due - time.monotonic()), MINUTE)):
            if time.monotonic() >= self._due:
                self.touch()
                self._speak()
