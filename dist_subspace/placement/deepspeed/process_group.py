"""The process group of DeepSpeed, and where a rank of it computes."""

from __future__ import annotations

import os

import torch

from dist_subspace.placement.collectives import is_distributed, world
from dist_subspace.placement.deepspeed.cpp_helpers import without_cpu_helper
from dist_subspace.placement.environment import is_alone, launched_by_mpi

without_cpu_helper()  # now, because a script may make a process group of its own before it calls anything here


def ensure_process_group() -> None:
    """Collective: make the process group if there is none, from the launcher's environment, or for one process."""
    if is_distributed():
        return
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if is_alone():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
        backend = get_accelerator().communication_backend_name()
        # There is nobody to meet, so there is no port either, which another program could hold.
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=launched_by_mpi(), verbose=False)


def agreed_device() -> torch.device:
    """Where this rank computes: DeepSpeed's accelerator, at the local rank."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name(world().local_rank))
