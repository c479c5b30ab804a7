"""The picture of an adapter: how far each layer moved, and in how many directions, by depth and kind of module. Local."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dist_subspace.errors import UsageError
from dist_subspace.report.places import OUTSIDE

PICTURE = "adapter.png"
COLOURS = "cividis"  # even in lightness, and the same to those who see two colours
BAR = "#0072b2"
NUMBERED = 12  # columns up to which each cell says its number

Values = NDArray[numpy.float64]


def adapter_picture(report: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the report of `adapter_report` as a PNG; returns where. A folder gets `adapter.png`.

    Raises:
        UsageError: where there is nothing to draw, or the folder of the picture is not there.
    """
    rows = report["by_layer"]
    if not rows:
        raise UsageError(f"{report['folder']} holds no layer whose movement could be drawn")
    target = Path(path) / PICTURE if Path(path).is_dir() else Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"PICTURE is {str(path)!r}, whose folder is not there; accepted: a PNG's path, or a folder")
    figure = _token_figure(report) if report["by_token"] else _figure(report, rows)
    partial = target.with_name(f".{target.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, target)
    return target


def _figure(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Figure:
    kinds, depths = list(dict.fromkeys(row["module"] for row in rows)), sorted({row["depth"] for row in rows})
    rank = max((row["rank"] for row in rows if row["rank"] is not None), default=None)
    panels: list[tuple[str, str, float | None]] = [("norm", _short(report["norm_of"]), None)]
    if rank is None:
        panels.append(("largest", "largest entry, absolute", None))
    else:
        panels.append(("effective_rank", f"effective rank, of at most {rank}", float(rank)))
    height = 1.3 + len(panels) * (0.8 + 0.34 * max(2, len(kinds)))
    width = min(16.0, max(7.5, 3.2 + 0.34 * len(depths) * (2 if len(depths) <= NUMBERED else 1)))
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, label, top) in zip(figure.subplots(len(panels), 1), panels, strict=True):
        _heat(figure, axes, _grid(rows, kinds, depths, key), kinds, depths, top)
        axes.set_title(label, fontsize=10, loc="left")
    figure.suptitle(_title(report), fontsize=12)
    return figure


def _token_figure(report: Mapping[str, Any]) -> Figure:
    """A bar for each virtual token."""
    norms = report["by_token"]
    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(range(len(norms)), norms, color=BAR)
    axes.set_xlabel("virtual token", fontsize=10)
    axes.set_ylabel("norm", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    row = report["by_layer"][0]
    axes.set_title(
        f"effective rank of the tokens {row['effective_rank']:.1f} of {row['rank']}", fontsize=10, loc="left"
    )
    figure.suptitle(_title(report), fontsize=12)
    return figure


def _grid(rows: Sequence[Mapping[str, Any]], kinds: list[str], depths: list[int], key: str) -> Values:
    """`(kinds, depths)`: the mean over the layers of a cell (experts share one); NaN where there is none."""
    sums, counts = numpy.zeros((len(kinds), len(depths))), numpy.zeros((len(kinds), len(depths)))
    for row in rows:
        if row[key] is not None:
            place = kinds.index(row["module"]), depths.index(row["depth"])
            sums[place] += row[key]
            counts[place] += 1
    return numpy.where(counts > 0, sums / numpy.maximum(counts, 1), numpy.nan)


def _heat(
    figure: Figure, axes: Axes, grid: Values, kinds: list[str], depths: list[int], top: float | None = None
) -> None:
    """Colours from 0 to `top`, or to the largest value."""
    finite = grid[numpy.isfinite(grid)]
    highest = top or (float(finite.max()) if finite.size else 0.0) or 1.0
    image = axes.imshow(grid, aspect="auto", cmap=COLOURS, vmin=0, vmax=highest, interpolation="nearest")
    axes.set_facecolor("#dddddd")  # no such layer
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
    _depth_axis(axes, depths)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    if len(depths) <= NUMBERED:
        for (i, j), value in numpy.ndenumerate(grid):
            if numpy.isfinite(value):
                colour = "black" if value > 0.55 * highest else "white"
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=8, color=colour)


def _depth_axis(axes: Axes, depths: list[int]) -> None:
    """Block numbers, at most about twenty of them; what lies in no block comes first."""
    step = max(1, -(-len(depths) // 20))
    shown = [i for i, depth in enumerate(depths) if depth == OUTSIDE or depth % step == 0]
    axes.set_xticks(shown, ["outside" if depths[i] == OUTSIDE else str(depths[i]) for i in shown], fontsize=9)
    axes.set_xlabel("block", fontsize=9)


def _short(meaning: str) -> str:
    """The symbol, or the words before a remark."""
    return meaning.split(":")[0].split(" (")[0]


def _title(report: Mapping[str, Any]) -> str:
    rank = f" (rank {report['rank']})" if report["rank"] else ""
    base = Path(str(report["base_model"])).name if report["base_model"] else None
    return "  ·  ".join(
        part for part in (base, f"{report['method']}{rank}", f"{report['parameters']:,} values") if part
    )
