"""The key-value store in which the ranks meet, at the address that the launcher gives, before there is a process group."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from dist_subspace.errors import UsageError
from dist_subspace.launchers import Place

LOOK = 0.1  # seconds between two looks
ANSWER = 30.0  # seconds in which a store that is there answers


def is_kept(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun holds the store, and keeps it, with all that is in it, when it starts the ranks again."""
    return variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt(variables: Mapping[str, str] = os.environ) -> str:
    """What tells the keys of the ranks that were started again from those of the ranks before. Agents count restarts each for
    itself, so it is asked only where the store is kept."""
    return variables.get("TORCHELASTIC_RESTART_COUNT", "0") if is_kept(variables) else "0"


def kept_store(place: Place) -> dist.Store | None:
    """For the process group of this attempt, where the store is kept: torch (2.13) would read there the addresses that the ranks
    of an earlier attempt have left, and connect to nobody. None elsewhere: the group makes its own store."""
    if not is_kept() or place.address is None:
        return None
    return dist.PrefixStore(f"dist_subspace/group/{attempt()}", _client(place))


def open_store(place: Place, deadline: float, patience: float) -> dist.Store:
    """The store: made by rank 0, unless torchrun holds one already. Asking for it from Python first keeps the C++ code from
    writing lines of its own while nobody is there yet.

    Arguments:
        deadline: of `time.monotonic`, until which rank 0 is waited for; patience: the seconds that a refusal names.

    Raises:
        UsageError: a port that is taken, an address that is not reached, an answer that is no store's.
    """
    assert place.address is not None
    serves = place.rank == 0 and not is_kept()
    try:
        if serves:
            _refuse_taken_port(place)
            server = dist.TCPStore(
                "localhost",
                place.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=ANSWER),
                multi_tenant=True,  # this process's process group shares it
            )
            _wait_for_answer(place, min(deadline, time.monotonic() + ANSWER), min(patience, ANSWER))
            return server
        _wait_for_answer(place, deadline, patience)
        return _client(place)
    except dist.DistError as error:
        raise UsageError(
            f"rank {place.rank} could not use the meeting at {address_of(place)}: {error}; accepted: the "
            "run started again, with another MASTER_PORT for all ranks where that does not help"
        ) from None


def _client(place: Place) -> dist.Store:
    """Made on a thread: where another program has the port and keeps silent, it waits for ever."""
    connected: list[dist.Store] = []
    host, wait = place.address or "", timedelta(seconds=ANSWER)

    def make() -> None:
        with suppress(dist.DistError):
            connected.append(dist.TCPStore(host, place.port, is_master=False, wait_for_workers=False, timeout=wait))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(ANSWER)
    if not connected:
        raise UsageError(
            f"what answers at {address_of(place)}, where rank {place.rank} would meet rank 0, is another program; "
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
                    f"{who}, on {socket.gethostname()}, did not reach rank 0 at {address_of(place)} in {patience:g} seconds "
                    f"({error}); accepted: a MASTER_ADDR by which every node reaches rank 0's"
                ) from None
            time.sleep(LOOK * 5)


def address_of(place: Place) -> str:
    return f"{place.address}:{place.port}"
