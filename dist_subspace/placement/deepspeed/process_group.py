"""The process group of DeepSpeed, and where a rank of it computes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch

from dist_subspace.errors import UsageError
from dist_subspace.launchers import Place, enter
from dist_subspace.placement.collectives import is_distributed
from dist_subspace.placement.deepspeed.cpp_helpers import without_cpu_helper
from dist_subspace.placement.rendezvous import met
from dist_subspace.placement.store import kept_store
from dist_subspace.placement.versions import facts

without_cpu_helper()  # now, because a script may make a process group of its own before it calls anything here


def ensure_process_group() -> None:
    """Collective: make the process group if there is none, from the launcher's environment, or for one process.

    Raises:
        UsageError: an environment that no launcher makes, or ranks that do not meet; on the one rank that shall say so.
    """
    if is_distributed():
        return
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.constants import default_pg_timeout

    place = enter()
    if place.is_alone:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
        backend = get_accelerator().communication_backend_name()
        # There is nobody to meet, so there is no port either, which another program could hold.
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    elif place.address is not None:
        _refuse_without_device()
        with met(place, default_pg_timeout.total_seconds(), facts()):
            _make_group(place)
        return
    deepspeed.init_distributed(auto_mpi_discovery=place.address is None and not place.is_alone, verbose=False)


def _make_group(place: Place) -> None:
    """Collective: as DeepSpeed makes it, which takes a group that is there.

    Raises:
        UsageError: a rank that has met the others cannot connect to them.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    try:
        if (store := kept_store(place)) is not None:
            timeout = timedelta(seconds=collective_timeout())
            backend = get_accelerator().communication_backend_name()
            torch.distributed.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout
            )
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except (RuntimeError, ValueError) as error:
        if "connect" not in str(error).lower():
            raise
        raise UsageError(
            f"rank {place.rank} on {socket.gethostname()} has met the others, and cannot connect to one of them "
            f"({str(error).splitlines()[0][-200:]}); accepted: an address of each host that all others reach (INTERFACE in "
            "launch/, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME)"
        ) from None


def collective_timeout() -> float:
    """Seconds, of DeepSpeed's process group: DEEPSPEED_TIMEOUT, in minutes, or ten of them."""
    from deepspeed.constants import default_pg_timeout

    return float(default_pg_timeout.total_seconds())


def _refuse_without_device() -> None:
    """Two ranks at one device would end in an error of NCCL's."""
    from deepspeed.accelerator import get_accelerator

    number, devices = int(os.environ["LOCAL_RANK"]), get_accelerator().device_count()
    if get_accelerator().device_name() == "cuda" and number >= devices:
        raise UsageError(
            f"rank {os.environ['RANK']} is number {number} on {socket.gethostname()}, where it sees {devices} "
            f"device{'' if devices == 1 else 's'}; accepted: one rank a device"
        )


def agreed_device() -> torch.device:
    """Where this rank computes: DeepSpeed's accelerator, at the local rank."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", 0))))
