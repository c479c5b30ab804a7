"""A real error in one rank, at a function of the product or of a library, where it is called from one place of the product."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dist_subspace.errors import UsageError
from tests.faults.places import Place
from tests.ranks import ROOT

SAID = "a fault of this rank alone"


@dataclass(frozen=True)
class Fault:
    """What raises: `module:function` or `module:Class.method`, the first time that it is called from within the place.

    kind: `disk` (an OSError), `usage` (a UsageError), `json` (a ValueError that is no UsageError), `kill` (SIGKILL).
    after: calls from the place that go well before that.
    """

    target: str
    place: Place
    kind: str = "disk"
    after: int = 0


def install(fault: Fault) -> None:
    """For the rest of this process's life."""
    _replace(fault)


FOUND_OUT = "found out that another rank is gone"


def say_if_found_out() -> None:
    """A rank that another one leaves without an agreement says so."""
    from dist_subspace.training import run

    end_without = run.end_without

    def said(*args: Any) -> int:
        print(FOUND_OUT, flush=True)
        return end_without(*args)

    run.end_without = said


@contextmanager
def installed(fault: Fault) -> Iterator[None]:
    undo = _replace(fault)
    try:
        yield
    finally:
        undo()


def _replace(fault: Fault) -> Callable[[], None]:
    module_name, _, path = fault.target.partition(":")
    module = importlib.import_module(module_name)
    holder: Any = module
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    before = getattr(holder, name)
    faulty = _faulty(before, fault)
    # A function may have been imported by name anywhere.
    found = [(holder, name)]
    if not outer:
        modules = [m for key, m in list(sys.modules.items()) if key.partition(".")[0] in ("dist_subspace", "deepspeed")]
        found += [(m, key) for m in modules for key, value in list(vars(m).items()) if value is before]
    for place, key in found:
        setattr(place, key, faulty)

    def undo() -> None:
        for place, key in found:
            setattr(place, key, before)

    return undo


def _faulty(function: Any, fault: Fault) -> Any:
    calls = 0

    @functools.wraps(function)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls <= fault.after and _within(fault.place):
            calls += 1
            if calls > fault.after:
                _fail(fault.kind)
        return function(*args, **kwargs)

    return faulty


def _within(place: Place) -> bool:
    file = str(ROOT / place.file)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == file and place.first <= frame.f_lineno <= place.last:
            return True
        frame = frame.f_back
    return False


def _fail(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "usage":
        raise UsageError(SAID)
    if kind == "json":
        raise ValueError(SAID)
    raise OSError(errno.EIO, SAID)
