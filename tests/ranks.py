"""Distributed tests on real processes: gloo, CPU, a pool for each world size, reused from case to case.

    def losses(stage):          # module level: it is imported by name in each rank
        ...
        return [1.0, 0.9]

    def test_all_ranks_see_the_same_loss():
        first, second = run_on_ranks(2, losses, 3)
        assert first == second

A rank that raises, dies or hangs ends the case with every rank's report, and the next case gets fresh processes. They are
forked from one process that has imported what they need (`tests.forked`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.forked import forked
from tests.ranks_worker import main

ROOT = Path(__file__).resolve().parent.parent
# A hang ends with a report long before the test's own limit does. Both lie far above a cold start: where two loaded cores are
# shared, two ranks have been seen to need over a minute for their imports alone, and a first case imports some more.
START_TIMEOUT = 300.0  # seconds until all ranks have imported torch and DeepSpeed, and have met
CASE_TIMEOUT = 300.0  # seconds of a case
GRACE = 3.0  # after the first failure, for the others to say what they saw
OUTPUT_SHOWN = 4000  # characters of a rank's output in a report


@dataclass
class RankReport:
    """What became of one rank in one case."""

    rank: int
    result: Any = None
    traceback: str | None = None
    exit_status: int | None = None  # of sys.exit inside the function, or of a process that ended (negative: a signal)
    answered: bool = False
    output: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.answered and self.traceback is None and self.exit_status is None

    def __str__(self) -> str:
        if self.good:
            head = "finished"
        elif self.traceback is not None:
            head = "raised\n" + self.traceback.rstrip()
        elif self.exit_status is not None:
            head = f"left with exit status {self.exit_status}"
        else:
            head = "gave no answer"
        tail = f"\n  last output:\n{self.output.rstrip()}" if self.output.strip() else ""
        return f"--- rank {self.rank} {head}{tail}"


class RanksFailed(AssertionError):
    """At least one rank raised, died or hung; the message holds every rank's traceback and last output."""

    def __init__(self, what: str, reports: list[RankReport]) -> None:
        self.reports = reports
        super().__init__("\n".join([what, *map(str, reports)]))


class Rank:
    """One process of a pool, with its pipe and the file that its output goes to."""

    def __init__(self, rank: int, world_size: int, port: int, folder: Path) -> None:
        self.rank = rank
        self.log = folder / f"rank{rank}.log"
        self.log_start = 0
        self.log.touch()
        self.pipe, far_end = Pipe()
        environment = rank_environment(rank, world_size, port)
        self.process = forked(main, far_end, str(ROOT), str(self.log), environment)
        far_end.close()

    def send(self, message: bytes) -> None:
        self.log_start = self.log.stat().st_size
        with contextlib.suppress(OSError):  # it is dead; receive() says so
            self.pipe.send_bytes(message)

    def receive(self) -> Any | None:
        """The next message, or None when the process has ended."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None

    def output(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")[-OUTPUT_SHOWN:]

    def show_stack(self) -> None:
        """Make a process that hangs write all its threads' stacks into its output."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGUSR1)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)  # with the children it may have
        self.process.kill()  # where it leads no group yet
        self.process.join()
        self.pipe.close()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": 1,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": 1,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return {**os.environ, **{name: str(value) for name, value in ours.items()}}


def outside_ranks() -> dict[str, str]:
    """The environment without what a launcher, or a run in this process, has said of ranks."""
    said = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in said}


def free_port() -> int:
    """Outside the range that the system takes ports for connections from: those of other tests come and go meanwhile."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


class Pool:
    """The processes of one world size, in one process group."""

    def __init__(self, world_size: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        port = free_port()
        self.ranks = [Rank(rank, world_size, port, Path(self.folder.name)) for rank in range(world_size)]
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> None:
        reports = self._collect(START_TIMEOUT, accept=lambda message: message[0] == "ready")
        if not all(report.good for report in reports):
            raise RanksFailed("the test ranks did not start", reports)

    def run(
        self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float, patient: bool
    ) -> list[RankReport]:
        """Run one case; `patient` waits for all ranks up to the timeout even when one of them has failed."""
        message = pickle.dumps((module_name(function), function.__qualname__, args))
        for rank in self.ranks:
            rank.send(message)
        return self._collect(timeout, accept=None, patient=patient)

    def _collect(self, timeout: float, accept: Callable[[Any], bool] | None, patient: bool = False) -> list[RankReport]:
        reports = [RankReport(rank.rank) for rank in self.ranks]
        waiting: dict[Connection, Rank] = {rank.pipe: rank for rank in self.ranks}
        start = time.monotonic()
        deadline = start + timeout
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                report = reports[rank.rank]
                report.seconds = time.monotonic() - start
                fill_report(report, rank, accept)
                if not report.good and not patient:
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in waiting.values():
            rank.show_stack()
        if waiting:
            time.sleep(0.5)
        for rank, report in zip(self.ranks, reports, strict=True):
            report.output = rank.output()
        return reports

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
        self.folder.cleanup()


def fill_report(report: RankReport, rank: Rank, accept: Callable[[Any], bool] | None) -> None:
    message = rank.receive()
    if message is None:
        rank.process.join()
        report.exit_status = rank.process.exitcode
        return
    report.answered = True
    if accept is not None:
        report.traceback = None if accept(message) else str(message[1])
        return
    answer, group_is_whole = message
    kind, value = pickle.loads(answer)
    if kind == "result":
        report.result = value
    elif kind == "exit":
        report.exit_status = value
    else:
        report.traceback = value
    if report.good and not group_is_whole:
        report.traceback = "the case ended without its process group: use run_once_on_ranks for such cases"


def module_name(function: Callable[..., Any]) -> str:
    """The dotted name under which a rank imports the function's module; functions inside functions have none."""
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} must be a function at module level, to be imported by each rank")
    file = Path(sys.modules[function.__module__].__file__ or "").resolve()
    if file.is_relative_to(ROOT / "tests"):
        return ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return function.__module__


_pools: dict[int, Pool] = {}


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = CASE_TIMEOUT) -> list[Any]:
    """Call `function(*args)` on every rank of the pool; its results in rank order.

    Raises `RanksFailed` when a rank raises, leaves or dies (a few seconds later) or the timeout in seconds is over.
    """
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = Pool(world_size)
    try:
        reports = pool.run(function, args, timeout, patient=False)
    except BaseException:
        close_pool(world_size)
        raise
    if not all(report.good for report in reports):
        close_pool(world_size)
        raise RanksFailed(f"{function.__qualname__}{args!r} failed on {world_size} ranks", reports)
    return [report.result for report in reports]


def run_once_on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = CASE_TIMEOUT
) -> list[RankReport]:
    """The same in processes of their own, for cases that end themselves: every rank's report, good or bad.

    Ranks that are left when another one fails are waited for; after the timeout they are killed, and their reports
    say that they gave no answer, with their stacks in `output`.
    """
    pool = Pool(world_size)
    try:
        return pool.run(function, args, timeout, patient=True)
    finally:
        pool.close()


def close_pool(world_size: int) -> None:
    pool = _pools.pop(world_size, None)
    if pool is not None:
        pool.close()


def close_pools() -> None:
    """End all processes of the harness (at the end of the session)."""
    for world_size in list(_pools):
        close_pool(world_size)


atexit.register(close_pools)
