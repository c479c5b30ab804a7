"""How far a long piece of work is, on standard error: a line that is written over on a terminal, else one each half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_ON_A_TERMINAL, _ELSEWHERE = 0.2, 30.0  # seconds between two lines
_SHORT = 2.0  # seconds of work of which nothing is said


class Progress:
    """`Progress("answering", "prompts")(done, total)` says what is done, the pace since the first call, and the time left."""

    def __init__(
        self,
        what: str,
        unit: str,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.what, self.unit, self.shown, self.stream = what, unit, shown, stream or sys.stderr
        self.on_terminal = self.stream.isatty()
        self.began: tuple[float, int] | None = None  # when, and how much was done by then
        self.last, self.width = 0.0, 0

    def __call__(self, done: int, total: int) -> None:
        now = self.clock()
        if self.began is None:
            self.began, self.last = (now, done), now
        pause = _ON_A_TERMINAL if self.on_terminal else _ELSEWHERE
        is_long = now - self.began[0] >= _SHORT
        if self.shown and total and is_long and (now - self.last >= pause or done == total):
            self.last = now
            self._write(self.text(done, total, now))

    def text(self, done: int, total: int, now: float) -> str:
        began, before = self.began or (now, done)
        made, seconds = done - before, now - began
        line = f"{self.what}: {done:,} of {total:,} {self.unit}"
        if made > 0 and done < total:
            line += f", {_duration((total - done) * seconds / made)} left"
        elif made > 0:
            line += f" in {_duration(seconds)}"
        return line

    def close(self) -> None:
        """Leave the terminal's line as it stands."""
        if self.width:
            self.stream.write("\n")
            self.width = 0

    def _write(self, line: str) -> None:
        if self.on_terminal:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
