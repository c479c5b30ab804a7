"""The picture of a search for the learning rate: the held-out loss over the rate, a line for each rung. Local."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from dist_subspace.atomic_files import storage_error

BEST, OWN, START, BAD = "#d1495b", "#5f6b76", "#5f6b76", "#e0a030"
COLOURS = "cividis"  # even in lightness, and the same to those who see two colours
ABOVE = 1.15  # the picture ends at so many times the loss before training: a rate that diverges must not press the rest flat
WIDE = 4.0  # times the lowest loss: an axis that goes so far is logarithmic
FLAT = 2.5  # times the height of the curves: so far from them the loss before training is shown


def rate_picture(found: Mapping[str, Any], path: Path) -> Path:
    """Draw what `dist-subspace find-lr` has found as a PNG; returns where.

    Raises:
        StorageError: the disk refuses.
    """
    figure = Figure(figsize=(9, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    highest = _draw_rungs(axes, found)
    low = min((loss for step in found["rungs"] for _, loss in points(found, step)), default=found["start_loss"])
    _draw_marks(axes, found, low, highest)
    _axes(axes, found, low)
    axes.set_title(_title(found), fontsize=12, pad=10)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    except OSError as error:
        raise storage_error(path, error) from error
    return path


def points(found: Mapping[str, Any], step: int) -> list[tuple[float, float]]:
    """(rate, held-out loss) of the rates that were measured after so many steps, ascending by rate."""
    losses = [
        (tried["learning_rate"], evaluation["eval_loss"])
        for tried in found["tried"]
        for evaluation in tried["evaluations"]
        if evaluation["step"] == step and evaluation["eval_loss"] is not None and math.isfinite(evaluation["eval_loss"])
    ]
    return sorted(losses)


def _draw_rungs(axes: Axes, found: Mapping[str, Any]) -> float:
    """A line a rung, darker the later; returns where the picture ends."""
    rungs = [(step, points(found, step)) for step in found["rungs"]]
    losses = [loss for _, line in rungs for _, loss in line] or [found["start_loss"]]
    highest = min(max(losses), ABOVE * max(found["start_loss"], min(losses)))
    shades = colormaps[COLOURS](numpy.linspace(0.75, 0.1, len(rungs)))
    for (step, line), colour in zip(rungs, shades, strict=True):
        if not line:
            continue
        rates, shown = [rate for rate, _ in line], [min(loss, highest) for _, loss in line]
        axes.plot(rates, shown, color=colour, linewidth=2, marker="o", markersize=5, label=f"after {step:,} steps")
    return highest


def _draw_marks(axes: Axes, found: Mapping[str, Any], low: float, highest: float) -> None:
    start, best = found["start_loss"], found["learning_rate"]
    if start - low <= FLAT * (highest - low):  # else the line would press the rest flat
        axes.axhline(start, color=START, linewidth=1, linestyle=":", label="before training")
    own = found["own_rate"]
    if own is not None:
        axes.axvline(own, color=OWN, linewidth=1.2, linestyle="--", label=f"the method's own, {_text(own)}")
    bad = [tried["learning_rate"] for tried in found["tried"] if tried["diverged"]]
    if bad:
        place = axes.get_xaxis_transform()
        marks = axes.plot(bad, [1.0] * len(bad), "x", color=BAD, transform=place, clip_on=False, label="diverged")
        marks[0].set(markeredgewidth=2.2, markersize=8, zorder=5)
    if best is not None:
        tried = next(one for one in found["tried"] if one["learning_rate"] == best)
        loss = tried["evaluations"][-1]["eval_loss"]
        axes.plot([best], [loss], "*", color=BEST, markersize=17, zorder=6, label=f"best, {_text(best)}: {loss:.4g}")


def _axes(axes: Axes, found: Mapping[str, Any], low: float) -> None:
    rates = sorted({tried["learning_rate"] for tried in found["tried"]} | ({found["own_rate"]} - {None}))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_apart(rates)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value)))
    if low > 0 and axes.get_ylim()[1] > WIDE * low:  # else a high loss would press the low ones, which matter, flat
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("learning rate", fontsize=11)
    axes.set_ylabel("validation loss", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9.5)


def _apart(rates: Sequence[float]) -> list[float]:
    """Those that have room for their number."""
    room = max(0.05, math.log10(max(rates) / min(rates)) / 16)
    shown: list[float] = []
    for rate in rates:
        if not shown or math.log10(rate / shown[-1]) >= room:
            shown.append(rate)
    return shown


def _text(rate: float) -> str:
    """3.0e-3."""
    return numpy.format_float_scientific(rate, precision=2, trim="0", exp_digits=1)


def _title(found: Mapping[str, Any]) -> str:
    about = found["about"]
    return "  ·  ".join(str(about[name]) for name in ("model", "method", "storage", "data") if about.get(name))
