"""RUN/loss.png: training loss, evaluation loss and learning rate over the steps. Local; no display is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from dist_subspace.errors import UsageError
from dist_subspace.report.history import METRICS, evaluation_lines, number, read_lines, training_lines

PICTURE = "loss.png"
TRAIN, EVAL, RATE, BAD = "#1f5fa8", "#d1495b", "#5f6b76", "#e0a030"

Values = NDArray[numpy.float64]


def loss_curve(run_dir: str | Path) -> Path:
    """Draw RUN/metrics.jsonl into RUN/loss.png, in one rename; returns its path.

    Raises:
        UsageError: no line of a step is there.
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
    figure.suptitle(title(run), fontsize=13)
    partial = run / f".{PICTURE}"
    figure.savefig(partial, format="png")
    os.replace(partial, run / PICTURE)
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
    here_count = count[high] - count[low]
    mean = (total[high] - total[low]) / numpy.maximum(here_count, 1)
    return numpy.where(here_count > 0, mean, numpy.nan)


def _draw_losses(axes: Axes, train: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> None:
    steps, losses = _column(train, "step"), _column(train, "loss")
    eval_steps, eval_losses = _column(evaluated, "step"), _column(evaluated, "eval_loss")
    window = max(1, len(losses) // 25)
    if window > 1:
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses, window), color=TRAIN, linewidth=2, label=f"training (mean of {window})")
    elif len(losses):
        axes.plot(steps, losses, color=TRAIN, linewidth=2, marker="o", markersize=4, label="training")
    if numpy.isfinite(eval_losses).any():
        few = "o" if len(eval_losses) <= 60 else None
        axes.plot(eval_steps, eval_losses, color=EVAL, linewidth=1.4, marker=few, markersize=5, label="evaluation")
    _limit(axes, losses, eval_losses)
    bad = steps[~numpy.isfinite(losses)]
    if len(bad):
        _mark_bad(axes, bad)
    axes.set_ylabel("loss", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=10, loc="upper right")


def _draw_rate(axes: Axes, train: list[dict[str, Any]]) -> None:
    rates = _column(train, "learning_rate")
    axes.plot(_column(train, "step"), rates, color=RATE, linewidth=1.4, marker="o" if len(rates) < 3 else None)
    axes.set_ylabel("learning\nrate", fontsize=10)
    axes.set_xlabel("step", fontsize=11)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _limit(axes: Axes, losses: Values, eval_losses: Values) -> None:
    """A single spike must not press the curve flat: beyond four times the usual range the picture is cut."""
    finite = losses[numpy.isfinite(losses)]
    if len(finite) < 20:
        return
    low, high = numpy.percentile(finite, [0, 99])
    top = max([high, *eval_losses[numpy.isfinite(eval_losses)]])
    if finite.max() > top + 4 * max(top - low, 1e-12):
        margin = 0.05 * (top - low)
        axes.set_ylim(low - margin, top + 4 * margin)


def _mark_bad(axes: Axes, steps: Values) -> None:
    """Crosses at the bottom edge where the loss was no finite number."""
    axes.plot(
        steps,
        numpy.zeros(len(steps)),
        linestyle="none",
        marker="x",
        color=BAD,
        markeredgewidth=2,
        clip_on=False,
        transform=axes.get_xaxis_transform(),
        label=f"not finite ({len(steps)})",
    )


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
