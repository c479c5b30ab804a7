"""What the doctor has found: what will break or may be better, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# How bad, by the kind of thing: of two that break a run, the one by which it breaks first.
ABSENT, UNREACHED, PACKAGES, REFUSED, DEVICE, STORAGE, DISK, MEMORY, CLOCK, LIMIT, REMARK = range(100, -10, -10)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    kind, about: the section and the row of the table; ranks: where; breaks: whether a run will break of it, else it is a warning;
    badness: the worst comes first; what: a sentence without its place; do: what to do about it.
    """

    kind: str
    about: str
    ranks: tuple[int, ...]
    what: str
    do: str
    badness: int
    breaks: bool = True


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """What breaks before what does not; the worst of each first, in the order of the ranks where they are alike."""
    return sorted(findings, key=lambda found: (not found.breaks, -found.badness, found.ranks))
