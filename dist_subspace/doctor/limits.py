"""What the system allows this process: open files, locked memory, shared memory."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_subspace.doctor.findings import LIMIT, MEMORY, Finding
from dist_subspace.doctor.ranks import Ranks, picked
from dist_subspace.doctor.sizes import size

KIND = "limits"
SHM = "/dev/shm"
# Open files of a rank beside its connections (two to each other rank, a store, the libraries), as a rank of a small run has them.
FILES = 256
FILES_A_RANK = 4
FILES_COMFORTABLE = 4096
# NCCL's buffers between the GPUs of a node: some channels of some MiB for each pair.
SHM_A_GPU, SHM_COMFORTABLE = 64 << 20, 1 << 30
SHM_ANYWHERE = 16 << 20  # workers that hand tensors over, semaphores


def examine() -> dict[str, Any]:
    """Bytes and numbers; -1 is no limit."""
    found: dict[str, Any] = {
        "open files": _limit(resource.RLIMIT_NOFILE),
        "locked memory": _limit(resource.RLIMIT_MEMLOCK),
        "infiniband": sorted(os.listdir("/sys/class/infiniband")) if Path("/sys/class/infiniband").is_dir() else [],
        "shm": None,
    }
    if Path(SHM).is_dir():
        usage = shutil.disk_usage(SHM)
        found["shm"] = {"total": usage.total, "free": usage.free, "writable": os.access(SHM, os.W_OK)}
    return found


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    found = ranks.of(KIND)
    yield "open files", picked(found, lambda facts: _number(facts["open files"]))
    yield "locked memory", picked(found, lambda facts: _bytes(facts["locked memory"]))
    yield SHM, picked(found, lambda facts: _shm_text(facts["shm"]))


def judge(ranks: Ranks) -> Iterator[Finding]:
    for rank, facts in ranks.of(KIND).items():
        yield from _of_files(rank, facts["open files"], ranks.size)
        yield from _of_locked_memory(rank, facts)
    for host, rank in ranks.firsts().items():
        facts = ranks.of(KIND).get(rank)
        if facts is not None:
            yield from _of_shm(rank, facts["shm"], _devices_shared(ranks, host))


def _of_files(rank: int, allowed: int, size: int) -> Iterator[Finding]:
    needed = FILES + FILES_A_RANK * size
    if 0 <= allowed < max(needed, FILES_COMFORTABLE):
        yield Finding(
            KIND,
            "open files",
            (rank,),
            f"a process may open {allowed} files"
            + (f", and one of {size} ranks needs about {needed}" if allowed < needed else ""),
            "raise the limit: ulimit -n 65536 before the launcher, LimitNOFILE of its service, or limits.conf",
            LIMIT,
            breaks=allowed < needed,
        )


def _of_locked_memory(rank: int, facts: dict[str, Any]) -> Iterator[Finding]:
    if facts["infiniband"] and facts["locked memory"] >= 0:
        yield Finding(
            KIND,
            "locked memory",
            (rank,),
            f"a process may lock {_bytes(facts['locked memory'])} of memory, and InfiniBand ({', '.join(facts['infiniband'])}) "
            "registers its buffers as locked memory",
            "ulimit -l unlimited before the launcher, LimitMEMLOCK=infinity of its service, --ulimit memlock=-1 of docker",
            LIMIT,
        )


def _of_shm(rank: int, shm: dict[str, Any] | None, devices: int) -> Iterator[Finding]:
    do = "mount it larger: docker's --shm-size, Kubernetes' emptyDir with medium Memory, or mount -o remount,size=8g /dev/shm"
    if shm is None:
        yield Finding(KIND, SHM, (rank,), "there is no /dev/shm", do, MEMORY)
        return
    needed = max(SHM_ANYWHERE, SHM_A_GPU * devices if devices > 1 else 0)
    wanted = SHM_COMFORTABLE if devices > 1 else SHM_A_GPU
    if shm["free"] < max(needed, wanted) or not shm["writable"]:
        said = f"/dev/shm has {_shm_text(shm)}"
        if shm["free"] < needed:
            said += f", and the ranks of a node hand {_bytes(needed)} through it"
        yield Finding(KIND, SHM, (rank,), said, do, MEMORY, breaks=shm["free"] < needed or not shm["writable"])


def _devices_shared(ranks: Ranks, host: str) -> int:
    """How many ranks of a node compute on GPUs, between which NCCL may go through shared memory."""
    found = ranks.of("devices")
    return sum(found.get(rank, {}).get("own", {}).get("type") == "cuda" for rank in ranks.hosts[host])


def _limit(which: int) -> int:
    soft = resource.getrlimit(which)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft


def _number(value: int) -> str:
    return "unlimited" if value < 0 else f"{value:,}"


def _bytes(value: int) -> str:
    return "unlimited" if value < 0 else size(value)


def _shm_text(shm: dict[str, Any] | None) -> str:
    if shm is None:
        return "absent"
    return f"{_bytes(shm['free'])} free of {_bytes(shm['total'])}" + ("" if shm["writable"] else ", not writable")
