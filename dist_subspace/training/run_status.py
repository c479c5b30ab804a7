"""RUN/status.json as the ranks of a run write it: rank 0 while it lasts, and where one rank failed, that one."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from dist_subspace.checkpoint.occupancy import Occupancy
from dist_subspace.checkpoint.store import check_writable
from dist_subspace.placement.collectives import on_main, world
from dist_subspace.run_folder.folder import RunFolder, StrPath
from dist_subspace.run_folder.status import State, read_status, write_status

_TIMES, _BETWEEN = 2, 0.2  # a heartbeat of rank 0 may have been on its way; it stops at what another rank has written


class RunStatus:
    """The state of one run. Until `take` has returned the folder may be another run's, and nothing is written."""

    def __init__(self, run_dir: StrPath, in_passing: bool = False) -> None:
        """in_passing: when it is over, the file says what it said before."""
        self.run, self._in_passing = RunFolder(run_dir), in_passing
        self.taken = False
        self._occupancy: Occupancy | None = None  # rank 0's
        self._writer: tuple[str, int] | None = None  # host and process of rank 0
        self._sees = False

    def take(self) -> None:
        """Collective: rank 0 makes the folder its own, and says that it is at work there.

        Raises:
            UsageError: another run is at work there, or it cannot be written to.
        """
        self._writer = on_main(self._occupy)
        self.taken = True

    def _occupy(self) -> tuple[str, int]:
        check_writable(self.run)
        self._occupancy = Occupancy(self.run, self._in_passing)
        self._occupancy.write("running")
        return socket.gethostname(), os.getpid()

    def sees_folder(self) -> bool:
        """Local: whether the run's folder on this rank's disk is rank 0's, where the run was at work."""
        self._sees = self._sees or self._is_ours()
        return self.taken and self._sees

    def is_running(self) -> bool:
        """Local: whether this rank sees that nobody has said yet how the run ended, and that the run has its folder still: rank 0
        may have been killed, and its lock with it."""
        return self.sees_folder() and self._is_ours() and (read_status(self.run) or {}).get("state") == "running"

    def _is_ours(self) -> bool:
        status = read_status(self.run) or {}
        return "pid" in status and (status.get("host"), status["pid"]) == self._writer

    def write(
        self,
        state: State,
        message: str = "",
        step: int | None = None,
        rank: int | None = None,
        anyone: bool = False,
        warning: str | None = None,
        skipped: int = 0,
        rank_host: str | None = None,
    ) -> None:
        """Local: rank 0's word, or with `anyone` that of any rank. Where the disk refuses, the screen must do."""
        if not self.taken or not (world().is_main or anyone):
            return
        more: dict[str, Any] = {"warning": warning, "skipped": skipped} if state == "finished" else {}
        if rank is not None and rank_host is not None:
            more["rank_host"] = rank_host
        try:
            if self._occupancy is not None:
                self._occupancy.write(state, message, step, rank, **more)
            else:
                for _ in range(_TIMES):
                    # Another run's, or somebody has said why this one ends: the first word stays.
                    if not self.is_running():
                        return
                    write_status(self.run, state, message, step, rank, **more)
                    time.sleep(_BETWEEN)
        except OSError:
            return

    def reached(self, step: int, facts: Mapping[str, Any]) -> None:
        """Local, rank 0: what status.json says next, within a second."""
        if self._occupancy is not None:
            self._occupancy.reached(step, facts)

    def release(self) -> None:
        """Local: the run is over, and has said so."""
        if self._occupancy is not None:
            self._occupancy.release()
