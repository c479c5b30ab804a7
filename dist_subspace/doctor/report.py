"""What the doctor says: a table of all that it looked at, and the findings, the worst first, each with what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dist_subspace.doctor.findings import Finding
from dist_subspace.doctor.kinds import KINDS
from dist_subspace.doctor.ranks import Ranks, alike


def as_json(ranks: Ranks, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "healthy": not any(found.breaks for found in findings),
        "ranks": ranks.size,
        "answered": list(ranks.facts),
        "nodes": ranks.hosts,
        "findings": [
            asdict(found) | {"where": ranks.where(found.ranks), "hosts": _hosts(ranks, found)} for found in findings
        ],
        "table": [
            {"section": section, "what": what, "where": where, "found": found}
            for section, what, where, found in table_rows(ranks)
        ],
        "facts": {str(rank): facts for rank, facts in ranks.facts.items()},
    }


def as_text(ranks: Ranks, findings: Sequence[Finding], width: int) -> str:
    """Title, table, findings and verdict, in lines of `width` columns."""
    parts = [_title(ranks), "", _table(ranks, width), ""]
    for title, breaks in (("What will break, the worst first:", True), ("What may be better:", False)):
        chosen = [found for found in findings if found.breaks is breaks]
        if chosen:
            parts += [
                title,
                *(_finding_text(number, ranks, found, width) for number, found in enumerate(chosen, 1)),
                "",
            ]
    count = sum(found.breaks for found in findings)
    parts.append("Nothing was found that breaks a run." if not count else f"{count} of these will break a run.")
    return "\n".join(parts)


def table_rows(ranks: Ranks) -> list[tuple[str, str, str, str]]:
    """(section, what, where, found): a line for each different value, the most frequent first."""
    lines = []
    for kind in KINDS:
        for what, values in kind.rows(ranks):
            groups = alike({rank: value for rank, value in values.items() if value not in (None, "")})
            speakers = set(values)
            for value, places in groups:
                everywhere = len(groups) == 1 and speakers >= set(ranks.firsts().values())
                lines.append((kind.name, what, "" if everywhere else ranks.where(places), str(value)))
    return lines


def _title(ranks: Ranks) -> str:
    launchers = sorted({str(facts["who"]["launcher"]) for facts in ranks.facts.values()})
    hosts = list(ranks.hosts)
    named = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    here = f"{len(ranks.facts)} of {ranks.size} ranks" if len(ranks.facts) < ranks.size else f"{ranks.size} ranks"
    if ranks.size == 1:
        return f"dist-subspace doctor: one process on {named}"
    on = f"on {len(hosts)} node{'s' if len(hosts) > 1 else ''} ({named})"
    return f"dist-subspace doctor: {here} {on}, started by {', '.join(launchers)}"


def _finding_text(number: int, ranks: Ranks, found: Finding, width: int) -> str:
    what = f"{ranks.where(found.ranks)}: {found.what}"
    return "\n".join(
        [
            textwrap.fill(
                what, width, initial_indent=f"{number:>3}. ", subsequent_indent="     ", break_on_hyphens=False
            ),
            textwrap.fill(
                found.do, width, initial_indent="     -> ", subsequent_indent="        ", break_on_hyphens=False
            ),
        ]
    )


def _table(ranks: Ranks, width: int) -> str:
    lines = table_rows(ranks)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # which is one of the findings
        return "\n".join("  ".join(filter(None, line)) for line in lines)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    several = any(where for _, _, where, _ in lines)
    for name in ("", "", *(["where"] if several else []), "found"):
        table.add_column(name, overflow="fold")
    before = ("", "")
    for section, what, where, found in lines:
        if before[0] and section != before[0]:
            table.add_row()
        shown = ["" if section == before[0] else section, "" if (section, what) == before else what]
        table.add_row(*shown, *([where or "everywhere"] if several else []), found)
        before = (section, what)
    console = Console(width=width, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _hosts(ranks: Ranks, found: Finding) -> list[str]:
    return list(dict.fromkeys(ranks.host(rank) for rank in found.ranks if rank in ranks.facts))
