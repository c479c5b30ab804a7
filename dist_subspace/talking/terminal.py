"""A chat on a terminal, or over a pipe: lines in, pieces of answers out."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dist_subspace.placement.collectives import broadcast_object, meet, world
from dist_subspace.talking.chat import Chat


class Keys:
    """What Ctrl-C asks for while an answer is written: that it ends. A second one before it has ended is Python's own."""

    def __init__(self) -> None:
        self.pressed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block Ctrl-C is noted."""
        self.pressed = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


def run_chat(chat: Chat, keys: Keys) -> None:
    """Collective: the chat, until its user leaves. Rank 0 alone reads and shows."""
    if world().is_main:
        with suppress(ImportError):
            import readline  # noqa: F401 (input() then knows the arrows and what was written before)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        line = next_line()
        if line is None:
            return
        with keys.listening():
            goes_on = chat.heard(line)
        if not goes_on:
            return


def next_line() -> str | None:
    """Collective: what the user writes to rank 0; None at the end of the input. The others wait in no collective: a user may
    think for hours."""
    line = _read() if world().is_main else None
    meet()
    return broadcast_object(line)


def _read() -> str | None:
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if sys.stdin.isatty() else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            lines = []
            print("\n/exit or Ctrl-D leaves", file=sys.stderr)
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
