"""What a launcher has told this process about others, before there is a process group."""

from __future__ import annotations

import os

_MPI_RANK, _MPI_SIZE = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"


def launched_by_mpi() -> bool:
    """Whether `mpirun` started this process."""
    return _MPI_RANK in os.environ


def is_alone() -> bool:
    """Whether no launcher started this process. Variables of a process that was alone may be inherited by its children; of a
    launcher's, the address is one."""
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    return os.environ.get("WORLD_SIZE", "1") == "1" and not launched and not launched_by_mpi()


def launched_ranks() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get(_MPI_SIZE) or 1)
