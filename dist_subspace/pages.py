"""Memory that is taken from the system by itself and given back whole, outside the C allocator's heap.

What lives long beside what comes and goes would keep the heap from shrinking: freed temporaries lie between the long-lived
pieces, and the process keeps them all.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress

import torch
from torch import Tensor

# Bytes below which a tensor lies in the heap: pages are rounded up, and a process may have so many mappings only.
SMALL = 1 << 14
# Bytes from which on memory is the system's again once it is free. Less would make the pages of a step's activations come and go.
LARGE = 1 << 22
_MMAP_THRESHOLD = -3  # of malloc.h


def zeros_in_pages(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros `(numel,)` on the CPU, in pages of their own; the system takes them back when the tensor goes."""
    size = numel * dtype.itemsize
    if size < SMALL or sys.platform == "win32":
        return torch.zeros(numel, dtype=dtype)
    # Private, as other memory is: a forked process gets a copy of what it writes.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=numel)


def give_back_freed() -> None:
    """Give what the C allocator holds of freed memory back to the system (`malloc_trim` of glibc; elsewhere nothing)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def take_large_from_system() -> None:
    """Let the C allocator take what is large from the system by itself, and give it back at once (`mallopt` of glibc; elsewhere
    nothing). By itself it does so at first only: sizes that were given back once, up to 32 MiB, come from its heap from then on,
    where gathered weights that come and go lie between what stays, and a process keeps several times what it holds. Whoever sets
    MALLOC_MMAP_THRESHOLD_ has decided for himself."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)
