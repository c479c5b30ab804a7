"""DeepSpeed's C++ helpers: none is built for CPUs, whoever makes the process group; NVMe's are asked for before a load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.placement.deepspeed.cpp_helpers import check_nvme_helpers
from tests.ranks import ROOT

NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}
OURS, THEIRS = "import dist_subspace.placement.deepspeed.process_group\n", "import deepspeed\n"
ORDERS = {
    "asked for between": OURS + "import importlib.util\nimportlib.util.find_spec('deepspeed')\n" + THEIRS,
    "ours first": OURS + THEIRS,
    "DeepSpeed first": THEIRS + OURS,
}
GROUP = """
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed(auto_mpi_discovery=False)
assert deepspeed.comm.comm.cdb.is_initialized()
print("helper:", deepspeed.comm.comm.cdb.shm_comm_op)
"""


@pytest.mark.parametrize(
    "order", [next(iter(ORDERS)), *(pytest.param(o, marks=pytest.mark.slow) for o in list(ORDERS)[1:])]
)
def test_a_process_group_on_cpus_needs_no_helper_whoever_makes_it(order: str, tmp_path: Path) -> None:
    """A lock that a killed build left would make DeepSpeed wait for ever."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    script = ORDERS[order] + GROUP
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "helper: None" in done.stdout, done.stdout + done.stderr


def test_what_is_not_on_nvme_asks_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for section in ({}, {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}):
        check_nvme_helpers(section)


@pytest.mark.parametrize("key", ["offload_param", "offload_optimizer"])
def test_nvme_without_what_compiles_its_helper_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"zero_optimization": {"stage": 3, key: {"device": "nvme", "nvme_path": "/tmp"}}}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=f"{key}.device is nvme.*a C\\+\\+ compiler \\(c\\+\\+\\), ninja is missing"):
        check_nvme_helpers(config)
    for name in ("c++", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(UsageError, match="libaio with its headers"):
        check_nvme_helpers(config)


def test_a_library_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own way of finding out, with a compiler, asked for a library that every machine has."""
    from deepspeed.accelerator import get_accelerator

    from dist_subspace.placement.deepspeed import cpp_helpers as helpers

    if shutil.which("ninja") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a compiler")
    kind = type(get_accelerator().create_op_builder("AsyncIOBuilder"))
    for library, found in (("c", []), ("no_such_library", ["libaio"])):
        monkeypatch.setattr(
            kind, "is_compatible", lambda self, library=library: self.has_function("malloc", (library,))
        )
        assert [name.split()[0] for name in helpers._missing()] == found


@pytest.mark.parametrize("helper", ["async_io", "pin_memory"])
def test_nvme_beside_the_lock_of_a_killed_build_is_refused_with_the_files_name(
    helper: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dist_subspace.placement.deepspeed import cpp_helpers as helpers

    monkeypatch.setattr(helpers, "_missing", list)  # as on a machine that has everything
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / helper / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    check_nvme_helpers(NVME)  # another process may be building
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    with pytest.raises(UsageError, match=f"waits for the lock {lock}.*remove that file"):
        check_nvme_helpers(NVME)
