"""The other ranks as processes: whether they live, and who was told to stop. Everything goes through the process group's
key-value store, so that no collective is needed, in which ranks wait for each other.

Local, but for `join`, which every rank calls. `look` is called now and then by a thread, with a store client of its own.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_subspace.launcher_processes import stat_of
from dist_subspace.stopping import Stop

_BEAT = 2.0  # seconds between two signs of life
_SILENT = 30.0  # seconds without one, after which a rank on another machine is taken for gone
_STOP_LOOK = 0.5  # seconds between two looks for a stop that another rank was told
_LEAVING = 15.0  # seconds that a rank has to leave by itself once another one has said why the run ends


@dataclass(frozen=True)
class Peer:
    """One rank's process. `machine` is equal for processes that can see each other; `started` tells two with one pid apart."""

    rank: int
    host: str
    machine: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @classmethod
    def of_this_process(cls, rank: int) -> Peer:
        return cls(rank, socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()))

    def has_ended(self) -> bool | None:
        """Whether the process has ended; None on another machine."""
        if self.machine != _machine():
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


def _machine() -> str:
    """Where process ids mean the same: host, boot, and the namespace of a container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _started(pid: int) -> str:
    fields = stat_of(pid)
    return "" if fields is None else fields[19]


class Peers:
    """The ranks of one run, seen from this one."""

    def __init__(self, store: Any, rank: int, size: int, stop: Stop) -> None:
        self._store, self._rank, self._size, self._stop = store.clone(), rank, size, stop
        run = self._store.add(f"dist_subspace/runs/{rank}", 1)  # a process may make several runs one after another
        self.prefix = f"dist_subspace/run/{run}"
        self._known: dict[int, Peer] = {}
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._beaten = self._looked = 0.0
        self._said = self._lost = False
        self.told: int | None = None  # the exit status of a rank that has said why the run ends
        self._told_at = 0.0
        self._set(f"peer/{rank}", json.dumps(asdict(Peer.of_this_process(rank))))

    def look(self) -> None:
        """Give a sign of life; pass a stop on, or hear of one, or of a failure. A store that has ended with its host has nothing
        to say."""
        now = time.monotonic()
        if self.told is not None and now - self._told_at > _LEAVING:
            os._exit(self.told)  # the main thread waits for a rank that is gone, where no connection breaks
        if self._lost:
            return
        self._lost = True
        with suppress(RuntimeError):
            if now - self._beaten > _BEAT:
                self._beaten = now
                self._set(f"beat/{self._rank}", str(now))
            if self._stop.reason is not None and not self._said:
                self._said = True
                self._set(f"heard/{self._rank}", "1")
                self._set("stop", self._stop.reason)
            elif self._stop.reason is None and now - self._looked > _STOP_LOOK:
                self._looked = now
                if self._has("stop"):
                    self._stop.tell(self._get("stop").decode())
            if self.told is None and self._has("told"):
                self.told, self._told_at = int(self._get("told")), now
                self._set(f"knows/{self._rank}", "1")
            self._learn()
            self._lost = False

    def tell(self, status: int, seconds: float) -> None:
        """This rank has said why the run ends, and leaves with this status: the others shall know, and not take it for one that
        was killed, before the store may end with this process. They have so many seconds to hear."""
        self.told, self._told_at = status, math.inf  # its own: nobody else is waited for
        with suppress(RuntimeError):
            self._set("told", str(status))
            deadline = time.monotonic() + seconds
            others = [rank for rank in range(self._size) if rank != self._rank]
            while time.monotonic() < deadline and not all(self._has(f"knows/{rank}") for rank in others):
                others = [rank for rank in others if rank not in {peer.rank for peer in self.gone()}]
                time.sleep(0.05)

    def gone(self) -> list[Peer]:
        """The ranks whose process has ended, or that have given no sign of life for long."""
        with suppress(RuntimeError):
            self._learn()
        gone = []
        for peer in self._known.values():
            ended = peer.has_ended()
            if ended or (ended is None and self._is_silent(peer)):
                gone.append(peer)
        return sorted(gone, key=lambda peer: peer.rank)

    def gone_within(self, seconds: float) -> list[Peer]:
        """As `gone`, where a connection has just broken: the process at its other end may take a moment to end."""
        deadline = time.monotonic() + seconds
        while not (gone := self.gone()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return gone

    def heard(self, peer: Peer) -> bool:
        """Whether that rank knew that it shall stop."""
        with suppress(RuntimeError):
            return self._has(f"heard/{peer.rank}")
        return False

    def _learn(self) -> None:
        for rank in range(self._size):
            if rank != self._rank and rank not in self._known and self._has(f"peer/{rank}"):
                self._known[rank] = Peer(**json.loads(self._get(f"peer/{rank}")))

    def _is_silent(self, peer: Peer) -> bool:
        now, before = time.monotonic(), self._beats.get(peer.rank)
        try:
            beat = self._get(f"beat/{peer.rank}") if self._has(f"beat/{peer.rank}") else b""
        except RuntimeError:
            return False
        if before is None or before[0] != beat:
            self._beats[peer.rank] = (beat, now)
            return False
        return bool(beat) and now - before[1] > _SILENT

    def _has(self, key: str) -> bool:
        return bool(self._store.check([f"{self.prefix}/{key}"]))

    def _get(self, key: str) -> bytes:
        return bytes(self._store.get(f"{self.prefix}/{key}"))

    def _set(self, key: str, value: str) -> None:
        self._store.set(f"{self.prefix}/{key}", value)


def join(stop: Stop) -> Peers | None:
    """Every rank calls it: this rank among the others; None where there are none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    return Peers(store, dist.get_rank(), dist.get_world_size(), stop)
