"""Memory that is taken from the system by itself and given back whole, outside the C allocator's heap.

What lives long beside what comes and goes would keep the heap from shrinking: freed temporaries lie between the long-lived
pieces, and the process keeps them all.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

# Bytes below which a tensor lies in the heap: pages are rounded up, and a process may have so many mappings only.
SMALL = 1 << 14
LARGE = 1 << 18  # bytes of what is mapped by itself
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


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


def give_back_large_at_once() -> None:
    """From now on memory from `LARGE` on goes back to the system when it is freed (`mallopt` of glibc; elsewhere nothing).

    glibc raises that bound up to 32 MiB by itself, and then weights that ZeRO-3 gathers and lets go lie in the heap, between
    what the step keeps: after one step the process holds as much as the whole packed model.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)
