"""The beginning and the end of the process group, and where a rank of it computes."""

from __future__ import annotations

import os
import threading

import torch

from dist_subspace.placement.collectives import is_distributed, world
from dist_subspace.placement.deepspeed.cpp_helpers import without_cpu_helper

without_cpu_helper()  # now, because a script may make a process group of its own before it calls anything here


def ensure_process_group() -> None:
    """Collective: make the process group if there is none, from the launcher's environment, or for one process."""
    if is_distributed():
        return
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    by_mpi = "OMPI_COMM_WORLD_RANK" in os.environ
    # Variables of a process that was alone may be inherited by its children; of a launcher's, the address is one.
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if os.environ.get("WORLD_SIZE", "1") == "1" and not launched and not by_mpi:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
        backend = get_accelerator().communication_backend_name()
        # There is nobody to meet, so there is no port either, which another program could hold.
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=by_mpi, verbose=False)


def leave_process_group() -> None:
    """Collective where ranks are well: end the process group before the interpreter ends, or gloo's threads may abort it. Where
    they are not, it is given a few seconds."""
    if is_distributed():
        ending = threading.Thread(target=torch.distributed.destroy_process_group, daemon=True)
        ending.start()
        ending.join(5.0)


def agreed_device() -> torch.device:
    """Where this rank computes: DeepSpeed's accelerator, at the local rank."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name(world().local_rank))
