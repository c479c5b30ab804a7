"""The ranks meet before there is a process group, and one that cannot be met, or must not be, is one sentence and no wait without
an end: a port that is taken, an address that is no rank's, a rank that does not come, two with one number, another package.

torch and DeepSpeed make their process group afterwards, from the same environment, over the same key-value store.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from dist_subspace.errors import UsageError
from dist_subspace.launchers import Place

_LOOK = 0.1  # seconds between two looks
_ANSWER = 30.0  # seconds in which a store that is there answers
_HEARING = 5.0  # seconds in which the others hear why the meeting is off
_ALIKE = ("torch", "deepspeed", "transformers", "bitsandbytes")


class RefusedElsewhere(UsageError):
    """The meeting is off, and another rank says why."""


def facts() -> dict[str, str]:
    """What must be alike on every node, whatever the model: Python, the packages that compute, and this one's own files."""
    versions = {"Python": ".".join(platform.python_version_tuple()[:2]), "dist_subspace": package_digest()}
    for name in _ALIKE:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name).partition("+")[0]
    return versions


def package_digest(folder: Path = Path(__file__).parents[1]) -> str:
    """A short hash of the package's source files: equal for equal commits, however they came here."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@contextmanager
def met(place: Place, patience: float, alike: Mapping[str, str]) -> Iterator[None]:
    """Collective: all ranks are here, each number once, with the same facts. Within the block the store is up, for those who
    meet in it next.

    Raises:
        UsageError: on the one rank that speaks; `RefusedElsewhere` on the others.
    """
    deadline = time.monotonic() + patience
    store = _open(place, deadline, patience)
    try:
        meeting = _Meeting(store, place, deadline)
        meeting.sign(alike)
        meeting.wait_for_all(patience)
    except dist.DistError as error:  # the store has ended with rank 0
        raise RefusedElsewhere(f"the meeting at {_address(place)} ended: {error}") from None
    yield
    del store


class _Meeting:
    """The names of the ranks in the store. A process that is restarted by torchrun signs anew."""

    def __init__(self, store: dist.Store, place: Place, deadline: float) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store, self._place, self._deadline = store, place, deadline
        self._prefix = f"dist_subspace/rendezvous/{attempt}"

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
                f"{signer['host']}, which meet at {_address(self._place)}; accepted: one process a rank, and a MASTER_PORT of "
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
                    f"rank {', '.join(absent)} of {size} did not come to {_address(self._place)} in {patience:g} seconds; "
                    f"here: rank {', '.join(here)}; "
                    "accepted: every rank started, with the same MASTER_ADDR and MASTER_PORT"
                )
            time.sleep(_LOOK)

    def _wait_for_key(self, key: str) -> None:
        while not self._has(key):
            self._heed_refusal()
            if time.monotonic() > self._deadline:
                self._refuse(
                    f"rank 0 did not come to {_address(self._place)}, where rank {self._place.rank} waits for it; accepted: rank "
                    "0 started too, with the same MASTER_ADDR and MASTER_PORT"
                )
            time.sleep(_LOOK)

    def _heed_refusal(self) -> None:
        if not self._has("off"):
            return
        message = self._get("off")
        self._store.add(f"{self._prefix}/heard", 1)
        if self._place.rank == 0:  # the store may end with it
            deadline = time.monotonic() + _HEARING
            while not self._has("over") and time.monotonic() < deadline:
                time.sleep(_LOOK)
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
                time.sleep(_LOOK)
            self._store.set(f"{self._prefix}/over", "1")
        raise UsageError(message)

    def _has(self, key: str) -> bool:
        return bool(self._store.check([f"{self._prefix}/{key}"]))

    def _get(self, key: str) -> str:
        return bytes(self._store.get(f"{self._prefix}/{key}")).decode()

    def _host(self, rank: int) -> str:
        return str(json.loads(self._get(str(rank)))["host"])


def _open(place: Place, deadline: float, patience: float) -> dist.Store:
    """The store: made by rank 0, unless torchrun holds one already. Asking for it from Python first keeps the C++ code from
    writing lines of its own while nobody is there yet."""
    assert place.address is not None
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if serves:
            _refuse_taken_port(place)
            server = dist.TCPStore(
                "localhost",
                place.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=_ANSWER),
                multi_tenant=True,  # this process's process group shares it
            )
            _wait_for_answer(place, min(deadline, time.monotonic() + _ANSWER), min(patience, _ANSWER))
            return server
        _wait_for_answer(place, deadline, patience)
        return _client(place)
    except dist.DistError as error:
        raise UsageError(
            f"rank {place.rank} could not use the meeting at {_address(place)}: {error}; accepted: the "
            "run started again, with another MASTER_PORT for all ranks where that does not help"
        ) from None


def _client(place: Place) -> dist.Store:
    """Made on a thread: where another program has the port and keeps silent, it waits for ever."""
    connected: list[dist.Store] = []
    host, wait = place.address or "", timedelta(seconds=_ANSWER)

    def make() -> None:
        with suppress(dist.DistError):
            connected.append(dist.TCPStore(host, place.port, is_master=False, wait_for_workers=False, timeout=wait))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(_ANSWER)
    if not connected:
        raise UsageError(
            f"what answers at {_address(place)}, where rank {place.rank} would meet rank 0, is another program; "
            "accepted: another MASTER_PORT, the same for all ranks"
        )
    return connected[0]


def _refuse_taken_port(place: Place) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UsageError(
                f"port {place.port} of {socket.gethostname()}, at which rank 0 would meet the others, is in use (another run "
                "here?) or not free to use; accepted: another MASTER_PORT, the same for all ranks"
            ) from None


def _wait_for_answer(place: Place, deadline: float, patience: float) -> None:
    """Until something answers at the meeting's address: names may become known, and rank 0 may start, later than this rank."""
    assert place.address is not None
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                who = "rank 0 itself" if place.rank == 0 else f"rank {place.rank}"
                raise UsageError(
                    f"{who}, on {socket.gethostname()}, did not reach rank 0 at {_address(place)} in {patience:g} seconds "
                    f"({error}); accepted: a MASTER_ADDR by which every node reaches rank 0's"
                ) from None
            time.sleep(_LOOK * 5)


def _address(place: Place) -> str:
    return f"{place.address}:{place.port}"
