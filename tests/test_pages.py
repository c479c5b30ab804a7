"""Memory in pages of its own: zeros, of any type, private to a process, and given back when it goes."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_subspace.pages import SMALL, give_back_freed, take_large_from_system, zeros_in_pages
from tests.ranks import ROOT


def resident() -> int:
    """Anonymous bytes of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("numel", [0, 1, SMALL - 1, SMALL, SMALL + 1, 100_003])
def test_zeros_of_any_type_and_size_are_written_like_others(dtype: torch.dtype, numel: int) -> None:
    tensor = zeros_in_pages(numel, dtype)
    assert tensor.shape == (numel,) and tensor.dtype == dtype and not tensor.any()
    tensor.fill_(3)
    assert torch.equal(tensor, torch.full((numel,), 3, dtype=dtype))
    tensor.note = "a tensor takes attributes"  # type: ignore[attr-defined]


def test_the_memory_goes_with_the_tensor() -> None:
    before = resident()
    tensor = zeros_in_pages(1 << 26, torch.uint8).fill_(1)
    small = zeros_in_pages(64, torch.uint8)  # comes later and stays: a heap would not shrink below it
    assert resident() - before > 1 << 25
    del tensor
    give_back_freed()
    assert resident() - before < 1 << 24 and not small.any()


def test_a_forked_process_has_memory_of_its_own() -> None:
    tensor = zeros_in_pages(2 * SMALL, torch.uint8)
    child = os.fork()
    if child == 0:
        tensor.fill_(7)
        os._exit(0)
    os.waitpid(child, 0)
    assert not tensor.any()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_what_was_gathered_and_let_go_between_small_tensors_that_stay_is_given_back() -> None:
    """What is mapped by itself goes back to the system when it is freed; what lies in the heap where nothing lies above it."""
    assert in_a_process("False") == 0, "glibc by itself takes from the heap what it has once given back"
    assert in_a_process("True") == 1
    assert in_a_process("True", "MALLOC_MMAP_THRESHOLD_") == 0, "a user has decided for himself"


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = [(f"before_{number}", ctypes.c_size_t) for number in range(3)] + [
        ("hblks", ctypes.c_size_t),
        *((f"behind_{number}", ctypes.c_size_t) for number in range(6)),
    ]


def mapped_for_a_large_one(large_at_once: bool) -> int:
    """Blocks that glibc maps for one tensor of 8 MiB after it has given back a larger one."""
    count = ctypes.CDLL(None).mallinfo2
    count.restype = MallInfo
    torch.ones(30 << 20, dtype=torch.uint8)
    if large_at_once:
        take_large_from_system()
    before = int(count().hblks)
    large = torch.ones(8 << 20, dtype=torch.uint8)
    return int(count().hblks) - before if large.numel() else 0


def in_a_process(large_at_once: str, variable: str = "UNUSED") -> int:
    """One of its own: what the allocator was told once stays, in forks too. The variable is set once glibc has read its own."""
    code = "import os; from tests.test_pages import mapped_for_a_large_one; "
    code += f"os.environ['{variable}'] = '1'; print(mapped_for_a_large_one({large_at_once}))"
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    return int(subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True).stdout)
