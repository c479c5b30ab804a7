"""What was measured, as a table, as JSON, and as a file in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_subspace.atomic_files import make_folder, write_json_atomic, write_text_atomic
from dist_subspace.evaluation.figures import METRICS, Measured
from dist_subspace.interchange.card_figures import with_figures
from dist_subspace.report.quantities import amount
from dist_subspace.run_folder.folder import RunFolder

ADAPTER, BASE = "adapter", "base"


@dataclass
class Evaluated:
    """about: what was measured on what; figures: by name, of the adapter, of the base, or of both; difference: the adapter's less
    the base's."""

    about: dict[str, Any]
    figures: dict[str, dict[str, Measured]] = field(default_factory=dict)
    difference: dict[str, Measured] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a number that is none is null."""
        found: dict[str, Any] = {"about": self.about}
        found |= {who: _entries(figures) for who, figures in self.figures.items()}
        if self.difference:
            found["difference"] = _entries(self.difference)
        return found

    def table(self) -> Table:
        """A row a figure; intervals of 95 % behind the figures."""
        table = Table(caption="[ ]: 95 % interval", caption_justify="left")
        table.add_column("figure", no_wrap=True)
        for who in self.figures:
            table.add_column(who, justify="right")
        if self.difference:
            table.add_column("difference", justify="right")
        for name in next(iter(self.figures.values())):
            cells = [_cell(name, figures[name]) for figures in self.figures.values()]
            if self.difference:
                cells.append(_cell(name, self.difference[name], signed=True))
            table.add_row(name.replace("_", " "), *cells)
        return table

    @property
    def title(self) -> str:
        """One line: what was measured, on which data, on how many samples."""
        about, counted = self.about, self.about["samples"]
        alike = len(set(counted.values())) == 1
        each = {"samples": next(iter(counted.values()))} if alike else counted
        counts = ", ".join(f"{count:,} {what}" for what, count in each.items())
        return f"{about['adapter'] or about['base']} ({about['storage']}) on {about['data']}: {counts}"


def _entries(figures: Mapping[str, Measured]) -> dict[str, Any]:
    return {
        name: {"value": measured.value, "interval": None if measured.interval is None else list(measured.interval)}
        for name, measured in figures.items()
    }


def _cell(name: str, measured: Measured, signed: bool = False) -> str:
    scale, unit = (100.0, " %") if name in METRICS and METRICS[name].is_share else (1.0, "")

    def text(value: float) -> str:
        shown = f"{scale * value:.2f}" if unit else amount(scale * value)
        return f"+{shown}" if signed and value > 0 else shown

    interval = "" if measured.interval is None else f" [{', '.join(map(text, measured.interval))}]"
    return f"{text(measured.value)}{unit}{interval}"


def print_figures(found: Evaluated, console: Console | None = None) -> None:
    """On standard output, a line and a table; a log file is wider than the 80 columns that rich assumes for it."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(found.title, soft_wrap=True, markup=False, highlight=False)
    console.print(found.table())


def write_card(run: RunFolder, found: Evaluated) -> Path | None:
    """The figures in the card of the run's adapter; None where there is none, or a person has edited it.

    Raises:
        StorageError: the disk refuses.
    """
    file = run.adapter / "README.md"
    try:
        card = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    of = {who: {name: (m.value, m.interval) for name, m in figures.items()} for who, figures in found.figures.items()}
    measured = with_figures(card, found.about["data"], of[ADAPTER], of.get(BASE))
    if measured == card:
        return None
    write_text_atomic(file, measured)
    return file


def write_result(run: RunFolder, result: Mapping[str, Any], adapter: Path, data: str) -> Path:
    """RUN/evaluations/ADAPTER-on-DATA.json, in the place of what an earlier evaluation of the two has left there.

    Raises:
        StorageError: the disk refuses.
    """
    stem = re.sub(r"[^\w.-]+", "-", Path(data).stem if len(data) < 200 else data[:60]).strip("-") or "data"
    file = run.evaluations / f"{adapter.name}-on-{stem}.json"
    make_folder(file.parent)
    write_json_atomic(file, result)
    return file
