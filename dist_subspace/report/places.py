"""Where in a model a layer stands, read off its name: how deep, and which kind of module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dist_subspace.families.blocks import stack_word

OUTSIDE = -1  # the depth of what lies in no block: an embedding's norm, the last norm


@dataclass(frozen=True)
class Place:
    """depth: the number of the block, or `OUTSIDE`; kind: the shortest ending that tells the model's kinds apart, after the
    name of the stack (encoder, decoder) where there are two."""

    depth: int
    kind: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """Each layer's place, by name."""
    split = {name: _split(name) for name in names}
    stacks = {stack for stack, depth, _ in split.values() if depth != OUTSIDE}
    short = _shortest_endings({inner for _, _, inner in split.values()})
    return {
        name: Place(depth, f"{stack} {short[inner]}" if len(stacks) > 1 and depth != OUTSIDE else short[inner])
        for name, (stack, depth, inner) in split.items()
    }


def _split(name: str) -> tuple[str, int, str]:
    """(last word of the stack's name that is no list, depth, what comes after the number without further numbers)."""
    components = name.split(".")
    number = next((i for i, c in enumerate(components) if c.isdigit()), None)
    if number is None:
        return "", OUTSIDE, name
    stack = stack_word(components)
    inner = [c for c in components[number + 1 :] if not c.isdigit()]
    return stack, int(components[number]), ".".join(inner) or components[number - 1]


def _shortest_endings(names: set[str]) -> dict[str, str]:
    """For each dotted name its shortest ending that no other of them has."""
    short = {}
    for name in names:
        components = name.split(".")
        endings = [".".join(components[start:]) for start in range(len(components) - 1, -1, -1)]
        others = [f".{other}" for other in names if other != name]
        short[name] = next((e for e in endings if not any(o.endswith(f".{e}") for o in others)), name)
    return short
