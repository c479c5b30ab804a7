"""Which evaluation is the best one, and how many have come since: what RUN/adapter is, and when a run stops early. Local, and
alike on every rank: it follows from the evaluations alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.records import EVALUATED
from dist_subspace.training.progress import Progress

_FALL = ("loss", "perplexity")  # metrics that get better by falling


def metric_of(config: Config) -> str | None:
    """The metric by which the best is chosen, by its name in an evaluation; None where nothing is. Who wants to stop early and
    names none means the loss."""
    wanted = config.checkpoint.metric_for_best_model
    if wanted is None:
        return f"{EVALUATED}loss" if config.training.early_stopping_patience is not None else None
    return wanted if wanted.startswith(EVALUATED) else f"{EVALUATED}{wanted}"


def check_measured(config: Config) -> None:
    """What asks for evaluations has something to evaluate on.

    Raises:
        UsageError: it has not.
    """
    patience, metric = config.training.early_stopping_patience, config.checkpoint.metric_for_best_model
    if config.data.eval is not None or (patience is None and metric is None):
        return
    key = "checkpoint.metric_for_best_model" if patience is None else "training.early_stopping_patience"
    raise UsageError(
        f"{key} is {metric if patience is None else patience!r}, but data.eval is null, so nothing is measured; accepted with "
        "it: data.eval as a file, or as the fraction of the training data that is held out"
    )


def note_evaluation(progress: Progress, config: Config, values: Mapping[str, float]) -> None:
    """Take an evaluation into account. What is measured before the first step is nobody's choice.

    Raises:
        UsageError: the metric is not measured here.
    """
    name = metric_of(config)
    if name is None:
        return
    if name not in values:
        wanted = config.checkpoint.metric_for_best_model
        raise UsageError(f"checkpoint.metric_for_best_model is {wanted!r}; measured here: {', '.join(values)}")
    if progress.step == 0:
        return
    if progress.best is not None and progress.best["metric"] != name:  # the configuration names another one than it did
        progress.best, progress.stale = None, 0
    greater, value, best = config.checkpoint.greater_is_better, values[name], progress.best
    up = not name.endswith(_FALL) if greater is None else greater
    # A diverged model is never the best, and JSON keeps no such number.
    if math.isfinite(value) and (best is None or (value > best["value"] if up else value < best["value"])):
        progress.best, progress.stale = {"metric": name, "value": value, "step": progress.step}, 0
    else:
        progress.stale += 1


def is_out_of_patience(progress: Progress, config: Config) -> bool:
    """Whether so many evaluations have brought nothing better that the run ends."""
    patience = config.training.early_stopping_patience
    return patience is not None and progress.stale >= patience


def stopped_early_text(progress: Progress) -> str:
    """Why a run ends before its last step."""
    best, count = progress.best, f"{progress.stale} evaluation{'' if progress.stale == 1 else 's'}"
    if best is None:
        return f"stopped early after step {progress.step:,}: {count} without a finite metric"
    return (
        f"stopped early after step {progress.step:,}: {count} without a better {best['metric']} than {best['value']:.6g} of "
        f"step {best['step']:,}"
    )


def chosen_text(progress: Progress, source: Path) -> str:
    """Which checkpoint RUN/adapter is."""
    if progress.best is None:
        return f"of {source.name}, the last"
    return f"of {source.name}, the best by {progress.best['metric']}: {progress.best['value']:.6g}"
