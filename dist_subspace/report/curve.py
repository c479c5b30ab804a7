"""RUN/loss.png: training loss, evaluation loss and learning rate over the steps. Local; no display is needed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dist_subspace.atomic_files import storage_error
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import RunFolder, StrPath
from dist_subspace.run_folder.metrics import evaluation_lines, read_lines, training_lines
from dist_subspace.run_folder.records import Evaluation, StepRecord
from dist_subspace.run_folder.saved_config import saved_sections

TRAIN, EVAL, RATE, ODD = "#1f5fa8", "#d1495b", "#5f6b76", "#e0a030"

Values = NDArray[numpy.float64]


def loss_curve(run_dir: StrPath) -> Path:
    """Draw RUN/metrics.jsonl into RUN/loss.png, in one rename; returns its path.

    Raises:
        UsageError: no line of a step is there. StorageError: the disk refuses.
    """
    run = RunFolder(run_dir)
    lines = read_lines(run)
    train, evaluated = training_lines(lines), evaluation_lines(lines)
    if not train and not evaluated:
        raise UsageError(f"{str(run)!r} has no {run.metrics.name} with a step in it; there is nothing to draw")
    figure = Figure(figsize=(9, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(loss, train, evaluated)
    _draw_rate(rate, train)
    loss.set_title(title(run), fontsize=13, pad=10)
    picture = run.picture
    partial = picture.with_name(f".{picture.name}")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, picture)
    except OSError as error:
        raise storage_error(picture, error) from error
    return picture


def title(run_dir: StrPath) -> str:
    """Model, method, storage and stage from RUN/config.yaml where it is there; else the folder's name."""
    config = saved_sections(run_dir)
    model, subspace, deepspeed = (config.get(name, {}) for name in ("model", "subspace", "deepspeed"))
    method, rank = subspace.get("method"), subspace.get("rank")
    parts = [
        Path(str(model.get("path") or Path(run_dir).resolve().name)).name,
        f"{method} (rank {rank})" if method and rank else method,
        model.get("storage"),
        deepspeed.get("preset"),
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
    is_spike = numpy.zeros(len(values), dtype=bool)
    if numpy.isfinite(values).sum() < 20:
        return is_spike
    padded = numpy.pad(numpy.where(numpy.isfinite(values), values, numpy.nan), 2, mode="edge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # five values in a row that are not finite have no median
        above = values - numpy.nanmedian(sliding_window_view(padded, 5), axis=1)
        usual = numpy.nanmedian(numpy.abs(numpy.where(numpy.isfinite(above), above, numpy.nan)))
        low, high = numpy.percentile(values[numpy.isfinite(values)], [5, 95])
    is_spike[1:] = above[1:] > 8 * usual + 0.25 * (high - low)
    return is_spike


def _draw_losses(axes: Axes, train: Sequence[StepRecord], evaluated: Sequence[Evaluation]) -> None:
    steps, losses = _values(line.step for line in train), _values(line.loss for line in train)
    eval_steps, eval_losses = _values(line.step for line in evaluated), _values(line.loss for line in evaluated)
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


def _draw_rate(axes: Axes, train: Sequence[StepRecord]) -> None:
    steps, rates = _values(line.step for line in train), _values(line.learning_rate for line in train)
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
    is_spike = spikes(losses)
    rest = numpy.concatenate([losses[numpy.isfinite(losses) & ~is_spike], eval_losses[numpy.isfinite(eval_losses)]])
    if not is_spike.any() or not len(rest):
        return numpy.zeros(len(losses), dtype=bool)
    low, high = rest.min(), rest.max()
    beyond = is_spike & (losses > high + 0.5 * (high - low))
    shown = numpy.concatenate([rest, losses[is_spike & ~beyond]])
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


def _values(numbers: Iterable[float | None]) -> Values:
    """One number a line; NaN where it is not known."""
    return numpy.array([numpy.nan if number is None else number for number in numbers], dtype=numpy.float64)
