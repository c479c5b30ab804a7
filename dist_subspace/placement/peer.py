"""One rank's process, as the other ranks know it: where it is, and whether it lives. Local."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_subspace.launcher_processes import stat_of


@dataclass(frozen=True)
class Peer:
    """One rank's process. `machine` is equal for processes that can see each other; `started` tells two with one pid apart;
    `address` is where others reach its host."""

    rank: int
    host: str
    machine: str
    pid: int
    started: str
    address: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @classmethod
    def of_this_process(cls, rank: int) -> Peer:
        pid = os.getpid()
        return cls(rank, socket.gethostname(), this_machine(), pid, _started(pid), own_address(rank))

    @property
    def is_here(self) -> bool:
        return self.machine == this_machine()

    def has_ended(self) -> bool | None:
        """Whether the process has ended; None on another machine."""
        if not self.is_here:
            return None
        fields = stat_of(self.pid)
        if fields is not None:
            return fields[0] in "ZX" or fields[19] != self.started
        if not Path("/proc/self/stat").exists():
            with suppress(PermissionError):
                try:
                    os.kill(self.pid, 0)
                except ProcessLookupError:
                    return True
            return False
        return True

    def is_stopped(self) -> bool:
        """Whether the process is on this machine, and was stopped (SIGSTOP, a debugger)."""
        fields = stat_of(self.pid) if self.is_here else None
        return fields is not None and fields[0] in "Tt"


def this_machine() -> str:
    """Where process ids mean the same: host, boot, and the namespace of a container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def own_address(rank: int, variables: Mapping[str, str] = os.environ) -> str:
    """Where the others reach this host: rank 0 where they meet it, any other by the address that it meets rank 0 from."""
    meeting = variables.get("MASTER_ADDR", "")
    if rank and meeting:
        with suppress(OSError):
            family, kind, _, _, place = socket.getaddrinfo(meeting, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(place)  # of datagrams: nothing is sent
                return str(probe.getsockname()[0])
    return meeting or socket.gethostname()


def _started(pid: int) -> str:
    fields = stat_of(pid)
    return "" if fields is None else fields[19]
