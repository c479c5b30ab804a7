"""The kinds of examinations, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dist_subspace.doctor import (
    clocks,
    configuration,
    devices,
    folders,
    hub,
    limits,
    network,
    storages,
    traffic,
    versions,
)
from dist_subspace.doctor.findings import DISK, Finding, worst_first
from dist_subspace.doctor.ranks import FAILED, Ranks, alike, is_failure

Rows = Iterable[tuple[str, dict[int, Any]]]


@dataclass(frozen=True)
class Kind:
    """name: of the facts and of the table's section; rows: (what, text by rank); judge: what is wrong."""

    name: str
    rows: Callable[[Ranks], Rows]
    judge: Callable[[Ranks], Iterable[Finding]]


KINDS = tuple(
    Kind(module.KIND, module.rows, module.judge)
    for module in (versions, devices, storages, network, traffic, clocks, folders, limits, hub, configuration)
)


def judge_all(ranks: Ranks) -> list[Finding]:
    """Everything that is wrong, the worst first; an examination that came to no end is wrong too."""
    found = [finding for kind in KINDS for finding in kind.judge(ranks)]
    return worst_first([*found, *_failures(ranks)])


def _failures(ranks: Ranks) -> Iterator[Finding]:
    for name in dict.fromkeys(name for facts in ranks.facts.values() for name in facts):
        failed = {rank: facts[name][FAILED] for rank, facts in ranks.facts.items() if is_failure(facts.get(name))}
        for why, places in alike(failed):
            what = f"the examination of {name} came to no end: {why}"
            yield Finding(name, "", tuple(places), what, "mend that first, then run the doctor again", DISK + 5)
