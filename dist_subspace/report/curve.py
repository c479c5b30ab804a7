"""RUN/loss.png: training loss, evaluation loss and learning rate over the steps. Local; no display is needed."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dist_subspace.atomic_files import storage_error
from dist_subspace.errors import UsageError
from dist_subspace.report.history import METRICS, evaluation_lines, number, read_lines, training_lines

PICTURE = "loss.png"
TRAIN, EVAL, RATE, ODD = "#1f5fa8", "#d1495b", "#5f6b76", "#e0a030"

Values = NDArray[numpy.float64]


def loss_curve(run_dir: str | Path) -> Path:
    """Draw RUN/metrics.jsonl into RUN/loss.png, in one rename; returns its path.

    Raises:
        UsageError: no line of a step is there. StorageError: the disk refuses.
    """
    run = Path(run_dir)
    lines = read_lines(run)
    train, evaluated = training_lines(lines), evaluation_lines(lines)
    if not train and not evaluated:
        raise UsageError(f"{str(run_dir)!r} has no {METRICS} with a step in it; there is nothing to draw")
    figure = Figure(figsize=(9, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(loss, train, evaluated)
    _draw_rate(rate, train)
    loss.set_title(title(run), fontsize=13, pad=10)
    partial = run / f".{PICTURE}"
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, run / PICTURE)
    except OSError as error:
        raise storage_error(run / PICTURE, error) from error
    return run / PICTURE


def title(run: Path) -> str:
    """Model, method, storage and stage from RUN/config.yaml where it is there; else the folder's name."""
    config = _config(run)
    parts = [
        Path(str(_in(config, "model", "path") or run.resolve().name)).name,
        _method(config),
        _in(config, "model", "storage"),
        _in(config, "deepspeed", "preset"),
    ]
    return "  ·  ".join(str(part) for part in parts if part)


def smoothed(values: Values, window: int) -> Values:
    """Centred mean over `window` points, fewer at the ends; values that are not finite take no part."""
    finite = numpy.isfinite(values)
    total = numpy.concatenate([[0.0], numpy.cumsum(numpy.where(finite, values, 0.0))])
    count = numpy.concatenate([[0], numpy.cumsum(finite)])
    here = numpy.arange(len(values))
    low, high = numpy.maximum(here - window // 2, 0), numpy.minimum(here + window // 2 + 1, len(values))
    points = count[high] - count[low]
    return numpy.where(points > 0, (total[high] - total[low]) / numpy.maximum(points, 1), numpy.nan)


def spikes(values: Values) -> NDArray[numpy.bool_]:
    """Which values stand far above their four neighbours: for these, and for the whole curve. The first never does."""
    found = numpy.zeros(len(values), dtype=bool)
    if numpy.isfinite(values).sum() < 20:
        return found
    padded = numpy.pad(numpy.where(numpy.isfinite(values), values, numpy.nan), 2, mode="edge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # five values in a row that are not finite have no median
        above = values - numpy.nanmedian(sliding_window_view(padded, 5), axis=1)
        usual = numpy.nanmedian(numpy.abs(numpy.where(numpy.isfinite(above), above, numpy.nan)))
        low, high = numpy.percentile(values[numpy.isfinite(values)], [5, 95])
    found[1:] = above[1:] > 8 * usual + 0.25 * (high - low)
    return found


def _draw_losses(axes: Axes, train: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> None:
    steps, losses = _column(train, "step"), _column(train, "loss")
    eval_steps, eval_losses = _column(evaluated, "step"), _column(evaluated, "eval_loss")
    half = len(losses) // 50
    if half:
        mean = smoothed(numpy.where(spikes(losses), numpy.nan, losses), 2 * half + 1)
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(steps, mean, color=TRAIN, linewidth=2, label=f"training (mean of {2 * half + 1} lines)")
    elif len(losses):
        axes.plot(steps, losses, color=TRAIN, linewidth=2, marker="o", markersize=4, label="training")
    if numpy.isfinite(eval_losses).any():
        few = "o" if len(eval_losses) <= 60 else None
        axes.plot(eval_steps, eval_losses, color=EVAL, linewidth=1.4, marker=few, markersize=5, label="evaluation")
    beyond = _cut_spikes(axes, losses, eval_losses)
    bad = ~numpy.isfinite(losses)
    if beyond.any():
        _mark(axes, steps[beyond], 1.0, "^", f"beyond the picture ({beyond.sum()}, up to {losses[beyond].max():.4g})")
    if bad.any():
        _mark(axes, steps[bad], 0.0, "x", f"not finite ({bad.sum()})")
    axes.set_ylabel("loss", fontsize=11)
    _plain(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=10, loc="upper right")


def _draw_rate(axes: Axes, train: list[dict[str, Any]]) -> None:
    steps, rates = _column(train, "step"), _column(train, "learning_rate")
    axes.plot(steps, rates, color=RATE, linewidth=1.4, marker="o" if len(rates) < 3 else None)
    highest = max(rates[numpy.isfinite(rates)], default=0.0)
    axes.set_ylim(0, 1.15 * highest or 1.0)
    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.set_ylabel("learning\nrate", fontsize=10)
    axes.set_xlabel("step", fontsize=11)
    axes.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: re.sub("e-0", "e-", f"{value:.1e}") if value else "0")
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _plain(axes)


def _cut_spikes(axes: Axes, losses: Values, eval_losses: Values) -> NDArray[numpy.bool_]:
    """A spike must not press the curve flat: the picture ends above everything else. Returns which losses lie beyond."""
    found = spikes(losses)
    rest = numpy.concatenate([losses[numpy.isfinite(losses) & ~found], eval_losses[numpy.isfinite(eval_losses)]])
    if not found.any() or not len(rest):
        return numpy.zeros(len(losses), dtype=bool)
    low, high = rest.min(), rest.max()
    beyond = found & (losses > high + 0.5 * (high - low))
    shown = numpy.concatenate([rest, losses[found & ~beyond]])
    if beyond.any():
        margin = 0.06 * (shown.max() - low)
        axes.set_ylim(low - margin, shown.max() + margin)
    return beyond


def _mark(axes: Axes, steps: Values, height: float, marker: str, label: str) -> None:
    """Marks on the lower (0) or upper (1) edge of the picture."""
    place = axes.get_xaxis_transform()
    marks = axes.plot(
        steps, numpy.full(len(steps), height), marker, color=ODD, clip_on=False, transform=place, label=label
    )
    marks[0].set(markeredgewidth=2, zorder=5)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _column(lines: list[dict[str, Any]], key: str) -> Values:
    return numpy.array([number(line, key) for line in lines], dtype=numpy.float64)


def _config(run: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _in(config: dict[str, Any], section: str, key: str) -> Any:
    found = config.get(section)
    return found.get(key) if isinstance(found, dict) else None


def _method(config: dict[str, Any]) -> str | None:
    name, rank = _in(config, "subspace", "method"), _in(config, "subspace", "rank")
    return f"{name} (rank {rank})" if name and rank else name
