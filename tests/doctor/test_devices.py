"""What is wrong with a rank's device: none, one that others have too, one whose memory is held, another one than elsewhere."""

from __future__ import annotations

from typing import Any

from dist_subspace.doctor.devices import examine, judge
from tests.doctor.facts import ranks_of, sentences

GIB = 1 << 30


def cuda(uuid: str = "a", free: int = 79, name: str = "H100", **changes: Any) -> dict[str, Any]:
    own = {"type": "cuda", "name": name, "capability": "9.0", "uuid": uuid, "total": 80 * GIB, "free": free * GIB}
    return cpu(count=2, own=own, **changes)


def cpu(**changes: Any) -> dict[str, Any]:
    memory = {"total": 8 * GIB, "available": 4 * GIB, "limit": None}
    base = {"cores": 2, "memory": memory, "count": 0, "number": 0, "driver": None, "asked for CPU": False}
    return base | {"built for": "13.0", "own": {"type": "cpu", "name": "CPU"}} | changes


def found(facts: list[Any], breaks: bool | None = None, hosts: list[str] | None = None) -> list[str]:
    ranks = ranks_of("devices", facts, hosts)
    return sentences(ranks, judge(ranks), breaks)


def test_devices_of_their_own_are_no_finding() -> None:
    assert found([cuda("a"), cuda("b")]) == []
    assert found([cpu(), cpu()]) == [], "a machine without a driver has no device to miss"
    assert found([cpu(**{"asked for CPU": True, "driver": "580"})]) == []


def test_a_driver_without_a_device_and_a_rank_without_the_device_that_others_have_are_named() -> None:
    said = found([cpu(driver="470.1")], breaks=True)
    assert said == ["node1: torch sees no CUDA device (driver 470.1, torch built for CUDA 13.0)"]
    assert found([cuda(), cpu()], breaks=True)[0].startswith("node2 (rank 1): torch sees no CUDA device (driver absent")
    assert "DS_ACCELERATOR is cpu" in found([cuda(), cpu(**{"asked for CPU": True})], breaks=True)[0]


def test_two_ranks_at_one_device_and_more_ranks_than_devices_are_named() -> None:
    said = found([cuda("a"), cuda("a"), cuda("a")], breaks=True, hosts=["node1", "node1", "node2"])
    assert said == ["node1 (ranks 0, 1): 2 ranks compute on one device of node1"]
    assert found([cuda(), cpu(count=1, number=1)], breaks=True) == [
        "node2 (rank 1): the rank is number 1 of its node, where it sees 1 devices"
    ]


def test_held_memory_and_another_device_are_remarks() -> None:
    assert found([cuda(free=20)], breaks=True) == []
    assert found([cuda(free=20)]) == ["node1: of the device's 80 GiB, 60 GiB are held already"]
    assert found([cuda("a"), cuda("b"), cuda("c", name="A100")], breaks=False) == [
        "node3 (rank 2): the device is A100, and H100 on node1, node2 (ranks 0, 1)"
    ]


def test_this_machine_is_examined() -> None:
    seen = examine(0)
    assert seen["own"]["type"] in ("cpu", "cuda") and seen["cores"] > 0
    assert 0 < seen["memory"]["available"] <= seen["memory"]["total"]
