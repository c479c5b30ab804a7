"""Dotted names of modules, compared by whole components: `wo` is not an ending of `two`."""

from __future__ import annotations

from collections.abc import Iterable


def ends_with(name: str, ending: str) -> bool:
    """Whether a dotted name is, or ends in, the given whole components."""
    return name == ending or name.endswith("." + ending)


def ends_with_any(name: str, endings: Iterable[str]) -> bool:
    """Whether a dotted name is, or ends in, one of the endings."""
    return any(ends_with(name, ending) for ending in endings)


def last_component(name: str) -> str:
    """`a.b.c` -> `c`."""
    return name.rpartition(".")[2]
