"""Ranks that end by themselves, as those of a launcher do: forked from one process that has imported everything.

    ended = run_script(2, ["config.yaml"], folder, before={1: (install, fault)})     # launch/train.py on two ranks
    assert [rank.status for rank in ended] == [1, 1], report(ended)

Each rank is a process of its own, whose limits, folder, environment and end are nobody else's, and costs no import.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from tests.forked import renew_threads
from tests.ranks import ROOT, START_TIMEOUT, free_port, rank_environment

Call = tuple[Any, ...]  # a function of a module, and its arguments
IMPORTED = ("tests.faults.imported",)
SCRIPT = ROOT / "launch" / "train.py"
LIMIT = 60.0  # seconds after which ranks are taken to wait for ever; a whole run takes two
Ran = TypeVar("Ran")
_warm: list[Any] = []
_starting = threading.Lock()
# One thread, and a place for the code of users' models, which is imported from there.
_OF_THE_SERVER = {"OPENBLAS_NUM_THREADS": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="dist_subspace-modules-")}
atexit.register(shutil.rmtree, _OF_THE_SERVER["HF_MODULES_CACHE"], ignore_errors=True)
_STACKS = signal.SIGUSR2  # SIGUSR1 is one that the product listens to


@dataclass
class Ended:
    """What became of one rank: its exit status (negative: a signal; None: it was waiting still, and was killed), its output."""

    rank: int
    status: int | None
    output: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The sentences that it said an error in."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def __str__(self) -> str:
        head = "was waiting still" if self.status is None else f"ended with {self.status}"
        return f"--- rank {self.rank} {head} after {self.seconds:.1f} s; it said:\n{self.output[-6000:]}"


def run_script(
    ranks: int, arguments: Sequence[str], folder: Path, before: Mapping[int, Call] | None = None, limit: float = LIMIT
) -> list[Ended]:
    """`launch/train.py` with these arguments on every rank of a world, in `folder`; in rank order.

    `before`: what a rank calls first.
    """
    return run_ranks([(_script, (before or {}).get(rank), list(arguments)) for rank in range(ranks)], folder, limit)


def side_by_side(*runs: Callable[[], Ran]) -> list[Ran]:
    """What each returns: runs that wait most of their time wait together."""
    with ThreadPoolExecutor(len(runs)) as threads:
        return [run.result() for run in [threads.submit(run) for run in runs]]


def run_ranks(calls: Sequence[Call], folder: Path, limit: float = LIMIT) -> list[Ended]:
    """Each rank makes its call, of a function of a module, in `folder`."""
    with _starting:
        context, port = _context(), free_port()
    logs = [folder / f".output-{port}-{rank}" for rank in range(len(calls))]
    processes = [
        context.Process(target=_rank, args=(rank, len(calls), port, str(logs[rank]), str(folder), call))
        for rank, call in enumerate(calls)
    ]
    began = time.monotonic()
    for process in processes:
        process.start()
    try:
        seconds = _waited_for(processes, began, limit)
        statuses = [process.exitcode for process in processes]
        _show_stacks(processes)
    finally:
        _kill(processes)
    outputs = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    return [Ended(rank, statuses[rank], outputs[rank], seconds[rank]) for rank in range(len(calls))]


def report(ended: Sequence[Ended]) -> str:
    return "\n".join(map(str, ended))


def _context() -> Any:
    """Its server is started once, with the imports that every rank needs and the environment of one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(rank_environment(0, 1, 0) | _OF_THE_SERVER)
        from multiprocessing.forkserver import ensure_running

        ensure_running()
        if not _warm:
            first = context.Process(target=os.getpid)
            first.start()
            first.join(START_TIMEOUT)  # the imports count for no rank's time
            _warm.append(first)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _waited_for(processes: Sequence[Any], began: float, limit: float) -> list[float]:
    seconds = [limit] * len(processes)
    left = {process.sentinel: rank for rank, process in enumerate(processes)}
    while left and (rest := began + limit - time.monotonic()) > 0:
        for sentinel in wait(list(left), timeout=rest):
            rank = left.pop(sentinel)  # type: ignore[call-overload]
            seconds[rank] = time.monotonic() - began
            processes[rank].join()
    return seconds


def _show_stacks(processes: Sequence[Any]) -> None:
    """What hangs writes all its threads' stacks into its output."""
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, _STACKS)
    if hanging:
        time.sleep(1.0)


def _kill(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()


def _rank(rank: int, ranks: int, port: int, log: str, folder: str, call: Call) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    renew_threads()
    faulthandler.register(_STACKS, file=2, all_threads=True)
    threading.Thread(target=_leave_with_the_test, daemon=True).start()
    os.environ.clear()
    os.environ.update(rank_environment(rank, ranks, port))
    os.chdir(folder)
    function, *arguments = call
    function(*arguments)


def _leave_with_the_test() -> None:
    """The server that this process was forked from lives for as long as one of its own does."""
    test = multiprocessing.parent_process()
    if test is not None:
        test.join()
        os._exit(1)


def _script(before: Call | None, arguments: list[str]) -> None:
    if before is not None:
        function, *given = before
        function(*given)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")
