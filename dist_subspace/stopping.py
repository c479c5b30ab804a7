"""What tells this process to stop, and where it may be left at once. Local, and without torch: it listens from the first line on.

A stop is noted at any moment, also while the main thread is inside a library's code, and acted on where the run is whole:
between micro-batches and batches of an evaluation by all ranks together, and, before anything is trained, wherever a rank
works for itself (`interruptible`).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dist_subspace.launcher_processes import Launcher

# Seconds that a stop may wait for the main thread where nothing is lost by leaving; launchers kill after 30.
PATIENCE = 20.0
_TICK = 0.25  # seconds between two looks
_AGAIN = 2.0  # seconds after which a further Ctrl-C is meant as one: launchers pass the first on, a moment later
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(BaseException):
    """The run was told to stop, and may be left here. As with KeyboardInterrupt, nobody on the way shall take it for a fault."""


class Stop:
    """Whether this process was told to stop, by what, and since when (`time.monotonic`). The first reason stays."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what this process was told."""
        self.reason: str | None = None
        self.since = 0.0
        self.leave: Callable[[str], int] | None = None  # last words of a process that is ended at once; its exit status
        self._may_raise = self._leavable = False
        self._looks: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return self.reason is not None

    def tell(self, reason: str) -> None:
        if self.reason is None:
            self.since = time.monotonic()
            self.reason = reason

    def heed(self) -> None:
        """Raise `Interrupted` if this process was told to stop."""
        if self.reason is not None:
            raise Interrupted(self.reason)

    @contextmanager
    def leavable(self) -> Iterator[None]:
        """Within the block nothing is lost by leaving: the parts in which a rank works for itself may be interrupted."""
        before, self._leavable = self._leavable, True
        try:
            yield
        finally:
            self._leavable = before

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block a stop raises `Interrupted` wherever the main thread is, if the run may be left (`leavable`).

        The block must hold no collective: the other ranks would wait in it.
        """
        before, self._may_raise = self._may_raise, self._leavable
        try:
            if self._may_raise:
                self.heed()
            yield
        finally:
            self._may_raise = before

    @contextmanager
    def watching(self, look: Callable[[], None]) -> Iterator[None]:
        """Within the block `look` is called every quarter of a second, on the watching thread."""
        self._looks.append(look)
        try:
            yield
        finally:
            self._looks.remove(look)

    def raise_if_possible(self) -> None:
        """Called by the signals' handler on the main thread. Raises once: what it interrupts shall clean up in peace."""
        if self.reason is not None and self._may_raise:
            self._may_raise = False
            raise Interrupted(self.reason)

    def look(self) -> None:
        """Called by the watching thread."""
        for look in list(self._looks):
            look()
        if self.reason is not None and self._leavable and time.monotonic() - self.since > PATIENCE:
            self.leave_at_once()

    def leave_at_once(self) -> None:
        """End this process as it is. Files appear by a rename when they are whole, so none is left half-written."""
        status = 1
        with suppress(Exception):
            status = self.leave(self.reason or "") if self.leave is not None else status
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


STOP = Stop()
_listener: _Listener | None = None


@contextmanager
def listening() -> Iterator[Stop]:
    """Within the block, signals and the end of the launcher tell `STOP`; an inner block changes nothing."""
    global _listener
    if _listener is not None:
        yield STOP
        return
    STOP.reset()  # what an earlier run in this process was told is over
    _listener = _Listener()
    try:
        yield STOP
    finally:
        _listener.close()
        _listener = None


class _Listener:
    """Signal handlers, and the thread that looks around while the main thread may be in a library's code for minutes.

    Python runs handlers between two of its own instructions only; the number of the signal is written into a pipe at once
    (`signal.set_wakeup_fd`), where the thread reads it.
    """

    def __init__(self) -> None:
        self._launcher = Launcher()
        self._in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        self._end, self._told, self._poked = threading.Event(), False, False
        self._interrupts: list[float] = []
        if self._in_main:
            self._read, self._write = os.pipe()
            for end in (self._read, self._write):
                os.set_blocking(end, False)
            self._before = {number: signal.signal(number, _heard) for number in _SIGNALS}
            self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        self._end.set()
        if self._in_main:
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            with suppress(OSError):
                os.write(self._write, b"\0")  # no signal's number: the thread need not finish its look first
        self._thread.join(2.0)
        if self._in_main and not self._thread.is_alive():
            os.close(self._read)
            os.close(self._write)

    def _watch(self) -> None:
        while not self._end.is_set():
            self._listen()
            if self._launcher.gone():
                STOP.tell("the end of its launcher")
            STOP.look()
            self._wake_main()

    def _listen(self) -> None:
        if not self._in_main:
            self._end.wait(_TICK)
            return
        ready, _, _ = select.select([self._read], [], [], _TICK)
        for number in os.read(self._read, 256) if ready else b"":
            if number in _SIGNALS and not (number == signal.SIGUSR1 and self._poked):
                STOP.tell(f"signal {signal.Signals(number).name}")
            if number == signal.SIGINT:
                self._interrupts.append(time.monotonic())
        if self._interrupts and self._interrupts[-1] - self._interrupts[0] > _AGAIN:
            STOP.leave_at_once()

    def _wake_main(self) -> None:
        """What this thread was told, the main thread hears as a signal: it may be working where it can be interrupted."""
        if STOP.reason is not None and not self._poked and self._in_main and not self._end.is_set():
            self._poked = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


def _heard(number: int, frame: FrameType | None) -> None:
    STOP.tell(f"signal {signal.Signals(number).name}")
    STOP.raise_if_possible()


def _forget_in_child() -> None:
    """A forked helper process is none of those that are told; it must not write into its parent's pipe either."""
    if _listener is not None and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
