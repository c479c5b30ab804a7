"""The facts of all ranks that answered, and how a place among them is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
Facts = dict[str, Any]  # of one rank: plain values by the kind of examination, as JSON can hold them
FAILED = "failed"  # the key of an examination that came to no end: why


class Ranks:
    """Each rank's facts by its number. `facts[kind]` is what the examination of that kind has found there."""

    def __init__(self, facts: Mapping[int, Facts], size: int) -> None:
        self.facts = dict(sorted(facts.items()))
        self.size = size
        self.hosts: dict[str, list[int]] = {}
        for rank, found in self.facts.items():
            self.hosts.setdefault(found["who"]["host"], []).append(rank)

    def of(self, kind: str) -> dict[int, Any]:
        """What an examination has found, by rank; without the ranks where it came to no end."""
        found = {rank: facts.get(kind) for rank, facts in self.facts.items()}
        return {rank: value for rank, value in found.items() if value is not None and not is_failure(value)}

    def host(self, rank: int) -> str:
        return str(self.facts[rank]["who"]["host"])

    def firsts(self) -> dict[str, int]:
        """The first rank of each node, which speaks for it."""
        return {host: ranks[0] for host, ranks in self.hosts.items()}

    def where(self, ranks: Iterable[int]) -> str:
        """The place in words: "node2 (rank 1)", "node2, node3 (ranks 1, 2)", "everywhere"."""
        chosen = sorted(set(ranks))
        if chosen == sorted(self.facts):
            return "everywhere" if len(self.hosts) > 1 else next(iter(self.hosts))
        hosts = list(dict.fromkeys(self.host(rank) for rank in chosen if rank in self.facts))
        numbers = f"rank{'s' if len(chosen) > 1 else ''} {_listed([str(rank) for rank in chosen])}"
        return f"{_listed(hosts)} ({numbers})" if hosts else numbers


def is_failure(value: object) -> bool:
    return isinstance(value, dict) and FAILED in value


def alike(values: Mapping[int, T]) -> list[tuple[T, list[int]]]:
    """The different values with their ranks, the most frequent first; of two that are as frequent, that of the lower rank."""
    groups: dict[str, tuple[T, list[int]]] = {}
    for rank, value in sorted(values.items()):
        groups.setdefault(json.dumps(value, sort_keys=True, default=str), (value, []))[1].append(rank)
    return sorted(groups.values(), key=lambda group: -len(group[1]))


def picked(found: Mapping[int, Any], pick: Callable[[Any], T]) -> dict[int, T]:
    """One part of each rank's facts."""
    return {rank: pick(value) for rank, value in found.items()}


def _listed(words: list[str], most: int = 6) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
