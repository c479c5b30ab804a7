"""Facts as ranks would send them, for judges, which are functions of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dist_subspace.doctor.findings import Finding
from dist_subspace.doctor.ranks import Ranks


def who(host: str, rank: int, size: int) -> dict[str, Any]:
    return {"host": host, "pid": 1000 + rank, "rank": rank, "size": size, "launcher": "torchrun", "python": "/python"}


def ranks_of(kind: str, facts: list[Any], hosts: list[str] | None = None, **others: list[Any]) -> Ranks:
    """Ranks 0, 1, ... with these facts of one kind, on node1, node2, ... or the hosts that are given; `others`: further kinds."""
    names = hosts or [f"node{number + 1}" for number in range(len(facts))]
    every: dict[int, dict[str, Any]] = {}
    for rank, (host, found) in enumerate(zip(names, facts, strict=True)):
        every[rank] = {"who": who(host, rank, len(facts)), kind: found} | {
            name: all_[rank] for name, all_ in others.items()
        }
    return Ranks(every, len(facts))


def sentences(ranks: Ranks, findings: Iterable[Finding], breaks: bool | None = None) -> list[str]:
    """Where and what, of each finding."""
    return [f"{ranks.where(found.ranks)}: {found.what}" for found in findings if breaks in (None, found.breaks)]
