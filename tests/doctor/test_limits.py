"""Too few open files, too little shared memory, and locked memory where InfiniBand needs it."""

from __future__ import annotations

import resource
from typing import Any

from dist_subspace.doctor.limits import examine, judge
from tests.doctor.facts import ranks_of, sentences

MIB = 1 << 20


def limits(
    files: int = 65536, locked: int = -1, shm: int | None = 8 << 30, cards: tuple[str, ...] = ()
) -> dict[str, Any]:
    size = None if shm is None else {"total": shm, "free": shm, "writable": True}
    return {"open files": files, "locked memory": locked, "infiniband": list(cards), "shm": size}


def found(facts: list[Any], breaks: bool = True, **others: list[Any]) -> list[str]:
    ranks = ranks_of("limits", facts, ["node1"] * len(facts), **others)
    return sentences(ranks, judge(ranks), breaks)


def test_ample_limits_are_no_finding() -> None:
    assert found([limits(), limits()]) == found([limits(), limits()], breaks=False) == []


def test_open_files_are_counted_by_the_number_of_ranks() -> None:
    assert found([limits(files=200)]) == ["node1: a process may open 200 files, and one of 1 ranks needs about 260"]
    assert found([limits(files=1024)]) == [] and len(found([limits(files=1024)], breaks=False)) == 1
    assert len(found([limits(files=1024)] * 200)) == 200


def test_shared_memory_is_needed_by_several_devices_of_a_node() -> None:
    assert found([limits(shm=MIB)]) == [
        "node1: /dev/shm has 1 MiB free of 1 MiB, and the ranks of a node hand 16 MiB through it"
    ]
    assert found([limits(shm=64 * MIB)] * 2) == []
    on_cuda = [{"own": {"type": "cuda"}}] * 2
    assert len(found([limits(shm=64 * MIB)] * 2, devices=on_cuda)) == 1, "the default of a container"
    assert found([limits(shm=None)]) == ["node1: there is no /dev/shm"]


def test_locked_memory_matters_where_there_is_infiniband() -> None:
    assert found([limits(locked=8 * MIB)]) == []
    assert found([limits(locked=8 * MIB, cards=("mlx5_0",))])[0].startswith("node1: a process may lock 8 MiB of memory")


def test_this_process_is_examined() -> None:
    assert examine()["open files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
