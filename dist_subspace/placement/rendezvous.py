"""The ranks meet before there is a process group, and one that cannot be met, or must not be, is one sentence and no wait without
an end: a port that is taken, an address that is no rank's, a rank that does not come, two with one number, another package.

torch and DeepSpeed make their process group afterwards, from the same environment, over the same key-value store.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist

from dist_subspace.errors import UsageError
from dist_subspace.launchers import Place
from dist_subspace.placement.store import LOOK, address_of, attempt, open_store

_HEARING = 5.0  # seconds in which the others hear why the meeting is off


class RefusedElsewhere(UsageError):
    """The meeting is off, and another rank says why."""


@contextmanager
def met(place: Place, patience: float, alike: Mapping[str, str]) -> Iterator[None]:
    """Collective: all ranks are here, each number once, with the same facts. Within the block the store is up, for those who
    meet in it next.

    Raises:
        UsageError: on the one rank that speaks; `RefusedElsewhere` on the others.
    """
    deadline = time.monotonic() + patience
    store = open_store(place, deadline, patience)
    try:
        meeting = _Meeting(store, place, deadline)
        meeting.sign(alike)
        meeting.wait_for_all(patience)
    except dist.DistError as error:  # the store has ended with rank 0
        raise RefusedElsewhere(f"the meeting at {address_of(place)} ended: {error}") from None
    yield
    del store


class _Meeting:
    """The names of the ranks in the store. A process that is restarted by torchrun signs anew."""

    def __init__(self, store: dist.Store, place: Place, deadline: float) -> None:
        self._store, self._place, self._deadline = store, place, deadline
        self._prefix = f"dist_subspace/rendezvous/{attempt()}"

    def sign(self, alike: Mapping[str, str]) -> None:
        """Rank 0 signs first; the others compare themselves with it."""
        rank = self._place.rank
        signer = {"host": socket.gethostname(), "pid": os.getpid(), "python": sys.executable, "alike": dict(alike)}
        if rank:
            self._wait_for_key("0")
            first = json.loads(self._get("0"))
            for name, value in signer["alike"].items():  # type: ignore[attr-defined]
                if first["alike"].get(name) != value:
                    self._refuse(
                        f"{signer['host']} (rank {rank}, {signer['python']}) has another {name} than {first['host']} (rank 0, "
                        f"{first['python']}): {value}, and not {first['alike'].get(name)}; accepted: the same on every node"
                    )
        text = json.dumps(signer)
        signed = self._store.compare_set(f"{self._prefix}/{rank}", "", text).decode()
        if signed != text:
            other = json.loads(signed)
            self._refuse(
                f"two processes are rank {rank} of {self._place.size}: {other['pid']} on {other['host']} and {signer['pid']} on "
                f"{signer['host']}, which meet at {address_of(self._place)}; accepted: one process a rank, and a MASTER_PORT of "
                "its own for each run"
            )
        if self._store.add(f"{self._prefix}/here", 1) == self._place.size:
            self._store.set(f"{self._prefix}/all", "1")

    def wait_for_all(self, patience: float) -> None:
        while not self._has("all"):
            self._heed_refusal()
            if time.monotonic() > self._deadline:
                size = self._place.size
                absent = [str(rank) for rank in range(size) if not self._has(str(rank))]
                here = [f"{rank} on {self._host(rank)}" for rank in range(size) if self._has(str(rank))]
                self._refuse(
                    f"rank {', '.join(absent)} of {size} did not come to {address_of(self._place)} in {patience:g} seconds; "
                    f"here: rank {', '.join(here)}; "
                    "accepted: every rank started, with the same MASTER_ADDR and MASTER_PORT"
                )
            time.sleep(LOOK)

    def _wait_for_key(self, key: str) -> None:
        while not self._has(key):
            self._heed_refusal()
            if time.monotonic() > self._deadline:
                self._refuse(
                    f"rank 0 did not come to {address_of(self._place)}, where rank {self._place.rank} waits for it; accepted: "
                    "rank 0 started too, with the same MASTER_ADDR and MASTER_PORT"
                )
            time.sleep(LOOK)

    def _heed_refusal(self) -> None:
        if not self._has("off"):
            return
        message = self._get("off")
        self._store.add(f"{self._prefix}/heard", 1)
        if self._place.rank == 0:  # the store may end with it
            deadline = time.monotonic() + _HEARING
            while not self._has("over") and time.monotonic() < deadline:
                time.sleep(LOOK)
        raise RefusedElsewhere(message)

    def _refuse(self, message: str) -> NoReturn:
        """The first that refuses says so, once the others have heard it: a launcher ends all ranks with the first that leaves."""
        with suppress(dist.DistError):
            if self._store.add(f"{self._prefix}/refusals", 1) > 1:
                self._wait_for_key("off")
                self._heed_refusal()
            self._store.set(f"{self._prefix}/off", message)
            deadline = time.monotonic() + _HEARING
            while self._store.add(f"{self._prefix}/heard", 0) < self._place.size - 1 and time.monotonic() < deadline:
                time.sleep(LOOK)
            self._store.set(f"{self._prefix}/over", "1")
        raise UsageError(message)

    def _has(self, key: str) -> bool:
        return bool(self._store.check([f"{self._prefix}/{key}"]))

    def _get(self, key: str) -> str:
        return bytes(self._store.get(f"{self._prefix}/{key}")).decode()

    def _host(self, rank: int) -> str:
        return str(json.loads(self._get(str(rank)))["host"])
