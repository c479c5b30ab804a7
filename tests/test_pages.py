"""Memory in pages of its own: zeros, of any type, private to a process, and given back when it goes."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_subspace.pages import SMALL, give_back_freed, zeros_in_pages
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


COME_AND_GO = """
import torch
from tests.benchmarks.load import anonymous
from dist_subspace.pages import take_large_from_system
take_large_from_system()
del_first = torch.ones(1 << 23); del del_first  # 32 MiB, up to which glibc now takes from its heap
before, kept = anonymous(), []
for _ in range(12):
    large = torch.ones(1 << 22)
    kept.append(torch.ones(1 << 14))
    other = torch.ones(1 << 22)
    del large, other
    kept.append(torch.ones(1 << 14))
print((anonymous() - before) >> 20)
"""


def test_what_is_large_goes_back_to_the_system_at_once() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    kept = {}
    for who, environment in (("ours", {}), ("the user's", {"MALLOC_MMAP_THRESHOLD_": str(1 << 25)})):
        command = [sys.executable, "-c", COME_AND_GO]
        own = {"PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=240)
        kept[who] = int(done.stdout)
    assert kept["ours"] < 4 and kept["the user's"] > 8, kept
