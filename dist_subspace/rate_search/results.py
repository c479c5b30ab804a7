"""What a search has found: as a table, as a line to paste, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_subspace.atomic_files import make_folder, write_json_atomic
from dist_subspace.rate_search.bench import Tried
from dist_subspace.rate_search.grid import rate_text
from dist_subspace.report.quantities import amount, clock_text
from dist_subspace.report.rate_picture import rate_picture

RESULT, PICTURE = "find-lr.json", "find-lr.png"
CLOSE = 1.01  # times the lowest loss


@dataclass(frozen=True)
class FoundRate:
    """What a search comes to.

    rate: the best one, None where none lowers the held-out loss. own_rate: the method's, None where it is not known. start_loss:
    the held-out loss before training. rungs: steps after which rates were compared. tried: ascending by rate. edge: the end of
    all rates that the best one lies at, lower or upper, None within them. folder: where the files are. about: what was trained.
    """

    rate: float | None
    own_rate: float | None
    start_loss: float
    rungs: list[int]
    tried: list[Tried]
    edge: str | None
    seconds: float
    folder: Path
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str | None:
        """The override, or the line for a configuration."""
        return None if self.rate is None else f"training.learning_rate={rate_text(self.rate)}"

    @property
    def verdict(self) -> str:
        """What follows from it, in a sentence."""
        if self.rate is None:
            return (
                f"no rate has lowered the held-out loss, which is {amount(self.start_loss)} before training: look at the data "
                "(`dist-subspace preview`), or give lower --rates or more --steps"
            )
        best = next(tried for tried in self.tried if tried.rate == self.rate)
        loss, last = best.loss_at(best.steps), best.steps
        said = (
            f"best: {rate_text(self.rate)}, held-out loss {amount(loss)} after {last} steps "
            f"(before training {amount(self.start_loss)})"
        )
        near = [tried.rate for tried in self.tried if tried.rate < best.rate and tried.loss_at(last) <= CLOSE * loss]
        if near:
            said += f"; {rate_text(near[-1])} comes within 1 % of it, and is the safer one for a long run"
        if self.edge is not None:
            side = "higher" if self.edge == "upper" else "lower"
            said += f"; it lies at the {self.edge} end of all rates, and a {side} one may be better"
        return said

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "learning_rate": self.rate,
            "line": self.line,
            "edge": self.edge,
            "own_rate": self.own_rate,
            "start_loss": self.start_loss,
            "rungs": self.rungs,
            "tried": [_entry(tried) for tried in self.tried],
            "about": self.about,
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> Table:
        """A row a rate."""
        own = any(tried.rate == self.own_rate for tried in self.tried)
        table = Table(caption="* the method's own rate" if own else None, caption_justify="left")
        for name in ("learning rate", "steps", "training loss", "validation loss"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("outcome")
        for tried in self.tried:
            table.add_row(*_cells(tried, self), style="bold" if tried.rate == self.rate else "")
        return table


def _cells(tried: Tried, found: FoundRate) -> list[str]:
    mark = " *" if tried.rate == found.own_rate else ""
    measured = max(tried.evaluations, default=None)
    loss = "-" if measured is None or tried.diverged else amount(tried.loss_at(measured))
    what = "best" if tried.rate == found.rate else tried.stopped or ""
    return [f"{rate_text(tried.rate)}{mark}", str(tried.steps), amount(tried.loss), loss, what]


def _entry(tried: Tried) -> dict[str, Any]:
    return {
        "learning_rate": tried.rate,
        "steps": tried.steps,
        "stopped": tried.stopped,
        "diverged": tried.diverged,
        "losses": tried.losses,
        "evaluations": [{"step": step, **values} for step, values in sorted(tried.evaluations.items())],
    }


def write_found(found: FoundRate) -> list[Path]:
    """Local, rank 0: the JSON and the picture, in the place of earlier ones.

    Raises:
        StorageError: the disk refuses.
    """
    make_folder(found.folder)
    result = found.folder / RESULT
    write_json_atomic(result, found.as_dict())
    return [result, rate_picture(found.as_dict(), found.folder / PICTURE)]


def print_found(found: FoundRate, files: Sequence[Path]) -> None:
    """On standard output; a log file is wider than the 80 columns that rich assumes for it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(found.table())
    for line in (found.verdict, *([found.line] if found.line else [])):
        console.print(line, soft_wrap=True, markup=False, style="bold" if line == found.line else None)
    console.print(f"written in {clock_text(found.seconds)}: {', '.join(map(str, files))}", soft_wrap=True, markup=False)
