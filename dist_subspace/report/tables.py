"""Tables for the command line: plain rows first, so that `--json` prints the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def methods_table(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a method, from the registry's `MethodInfo`."""
    return [
        {
            "name": info.name,
            "category": info.category,
            "what": info.summary,
            "parameters a layer": info.count,
            "targets": info.targets if isinstance(info.targets, str) else "key, value, FFN-up",
            "mergeable": info.mergeable,
            "statistic": info.statistic,
            "constraints": list(info.constraints),
            "options": {name: option.default for name, option in info.options.items()},
            "arXiv": info.reference,
        }
        for info in methods.values()
    ]


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table; a column that says nothing about any of them is left out (`--json` has it)."""
    table = Table(title=title, title_justify="left")
    columns = [name for name in rows[0] if any(_cell(row[name]) not in _NOTHING for row in rows)]
    for column in columns:
        table.add_column(column, overflow="fold", min_width=len(max(column.split(), key=len)))
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    Console().print(table)


_NOTHING = ("-", "none", "")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "\n".join(f"{name}={default}" for name, default in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)
