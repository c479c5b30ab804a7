"""The devices of each rank: which one it computes on, whether it has it for itself, and how much of its memory is free now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_subspace.doctor.findings import DEVICE, REMARK, Finding
from dist_subspace.doctor.ranks import Ranks, alike, picked
from dist_subspace.doctor.sizes import size
from dist_subspace.doctor.versions import driver_version

KIND = "devices"
HELD_BY_OTHERS = 0.1  # of a device's memory: more than a context and a desktop take


def examine(local_rank: int) -> dict[str, Any]:
    """The device at `local_rank` as the run would choose it, and the node's memory (bytes) and cores.

    Arguments:
        local_rank: LOCAL_RANK, by which torch and DeepSpeed choose the device.
    """
    import torch

    on_cuda = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()
    count = torch.cuda.device_count() if on_cuda else 0
    found: dict[str, Any] = {"cores": _cores(), "memory": _memory(), "count": count, "number": local_rank}
    found["driver"] = driver_version()
    found["asked for CPU"] = os.environ.get("DS_ACCELERATOR") == "cpu"
    found["built for"] = torch.version.cuda
    found["own"] = {"type": "cpu", "name": "CPU"}
    if on_cuda and local_rank < count:
        properties = torch.cuda.get_device_properties(local_rank)
        free, total = torch.cuda.mem_get_info(local_rank)
        found["own"] = {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "uuid": str(getattr(properties, "uuid", "")),
            "total": total,
            "free": free,
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return found


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    found = ranks.of(KIND)
    yield "device of a rank", picked(found, _own_text)
    if any(facts["own"]["type"] == "cuda" for facts in found.values()):
        yield "its memory", picked(found, lambda facts: _device_memory(facts["own"]))
        yield "devices seen", picked(found, lambda facts: str(facts["count"]))
    yield "CPU cores", picked(found, lambda facts: str(facts["cores"]))
    firsts = set(ranks.firsts().values())
    yield "node's memory", {rank: _memory_text(facts["memory"]) for rank, facts in found.items() if rank in firsts}


def judge(ranks: Ranks) -> Iterator[Finding]:
    found = ranks.of(KIND)
    kinds = alike(picked(found, lambda facts: facts["own"]["type"]))
    for rank, facts in found.items():
        yield from _own(rank, facts, any(other["own"]["type"] == "cuda" for other in found.values()))
    yield from _shared(ranks, found)
    names = alike({rank: facts["own"]["name"] for rank, facts in found.items() if facts["own"]["type"] == "cuda"})
    if len(kinds) == 1 and len(names) > 1:
        for name, places in names[1:]:
            yield Finding(
                KIND,
                "device of a rank",
                tuple(places),
                f"the device is {name}, and {names[0][0]} on {ranks.where(names[0][1])}",
                "use alike devices: all wait for the slowest, and the smallest memory counts",
                REMARK,
                breaks=False,
            )


def _own(rank: int, facts: dict[str, Any], others_have: bool) -> Iterator[Finding]:
    own = facts["own"]
    if own["type"] == "cuda":
        held = own["total"] - own["free"]
        if held > HELD_BY_OTHERS * own["total"]:
            yield Finding(
                KIND,
                "its memory",
                (rank,),
                f"of the device's {size(own['total'])}, {size(held)} are held already",
                "look with nvidia-smi who holds them, and end what was left behind",
                DEVICE,
                breaks=False,
            )
        return
    if facts["asked for CPU"] and not others_have:
        return
    if facts["count"] and facts["number"] >= facts["count"]:
        what = f"the rank is number {facts['number']} of its node, where it sees {facts['count']} devices"
        yield Finding(KIND, "device of a rank", (rank,), what, "start one rank a device", DEVICE)
    elif facts["asked for CPU"]:
        what = "DS_ACCELERATOR is cpu, and other ranks compute on CUDA"
        yield Finding(KIND, "device of a rank", (rank,), what, "set DS_ACCELERATOR alike on every node", DEVICE)
    elif others_have or facts["driver"] is not None:
        what = f"torch sees no CUDA device (driver {facts['driver'] or 'absent'}, torch built for CUDA {facts['built for']})"
        do = (
            "look with nvidia-smi whether the device answers; update the driver, or install a torch for this one's CUDA"
        )
        yield Finding(KIND, "device of a rank", (rank,), what, f"{do}; DS_ACCELERATOR=cpu where none is wanted", DEVICE)


def _shared(ranks: Ranks, found: dict[int, Any]) -> Iterator[Finding]:
    """Two ranks at one device, which NCCL refuses."""
    for host, members in ranks.hosts.items():
        owners: dict[str, list[int]] = {}
        for rank in members:
            if uuid := found.get(rank, {}).get("own", {}).get("uuid"):
                owners.setdefault(uuid, []).append(rank)
        for places in owners.values():
            if len(places) > 1:
                yield Finding(
                    KIND,
                    "device of a rank",
                    tuple(places),
                    f"{len(places)} ranks compute on one device of {host}",
                    "start one rank a device (srun --gpus-per-task=1, or LOCAL_RANK and CUDA_VISIBLE_DEVICES that fit)",
                    DEVICE,
                )


def _own_text(facts: dict[str, Any]) -> str:
    own = facts["own"]
    return f"{own['name']} ({own['capability']})" if own["type"] == "cuda" else own["name"]


def _device_memory(own: dict[str, Any]) -> str:
    return f"{size(own['free'])} free of {size(own['total'])}" if own["type"] == "cuda" else ""


def _memory_text(memory: dict[str, int | None]) -> str:
    if memory["available"] is None or memory["total"] is None:
        return "not known"
    text = f"{size(memory['available'])} free of {size(memory['total'])}"
    return f"{text}; limit {size(memory['limit'])}" if memory["limit"] is not None else text


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> dict[str, int | None]:
    """Of the node, in bytes: all, what can be had now, and what the container or job is allowed."""
    found: dict[str, int | None] = {"total": None, "available": None, "limit": None}
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        found["total"] = total = int(lines["MemTotal"].split()[0]) * 1024
        found["available"] = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return found
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(file).read_text())
        except (OSError, ValueError):
            continue
        if limit < total:
            found["limit"] = limit
    return found
