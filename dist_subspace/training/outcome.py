"""What a run's steps say about its end: were they applied, and did the loss fall? Local, alike on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dist_subspace.run_folder.records import StepRecord

DIVERGED = 1.5  # a loss that has grown by more than half


def losses_by_step(lines: Sequence[StepRecord], made_here: Sequence[float], first: int) -> list[float]:
    """The loss of every step that is known, in order.

    Arguments:
        lines: the training lines of metrics.jsonl: their loss is the mean over the steps since the line before.
        made_here: the loss of each step that this process has made; they count for their steps in the place of lines.
        first: how many steps were made before those.
    """
    known: list[float] = []
    before = 0
    for line in lines:
        if line.step > first:
            continue
        known += [line.loss] * max(0, line.step - before)
        before = line.step
    return [*known, *made_here]


def divergence(losses: Sequence[float]) -> str | None:
    """A sentence where the mean loss of the last tenth of the steps is more than half above the first tenth's."""
    count = max(1, len(losses) // 10)
    if len(losses) < 2:
        return None
    first, last = _mean(losses[:count]), _mean(losses[-count:])
    if first is None or first <= 0:
        return None
    steps = "step" if count == 1 else f"{count:,} steps"
    if last is None:
        return f"the run diverged: no loss of its last {steps} is finite"
    if last <= DIVERGED * first:
        return None
    return (
        f"the run diverged: the mean loss of its last {steps} is {last:.4g}, of its first {first:.4g}; "
        "a lower training.learning_rate may help"
    )


def skipped_text(skipped: int, steps: int) -> str | None:
    """How many of all steps changed nothing; None where every one did."""
    return f"{skipped:,} of {steps:,} steps were skipped, because they were not finite" if skipped else None


def failure(skipped: int, steps: int, last_loss: float | None) -> str | None:
    """Why there is no adapter to write: nothing was ever applied, or what was makes the model compute no numbers.

    Arguments:
        last_loss: of the trained model on a batch of the training data; None where it was not measured.
    """
    if steps and skipped >= steps:
        return (
            f"{skipped:,} of {steps:,} steps were skipped, because they were not finite: nothing was trained; {_ADVICE}"
        )
    if last_loss is not None and not math.isfinite(last_loss):
        said = skipped_text(skipped, steps)
        return f"the trained model's loss is {last_loss}{f' ({said})' if said else ''}; {_ADVICE}"
    return None


_ADVICE = (
    "no adapter is written; go back (checkpoint.resume: none, or a checkpoint from before) with a lower training.learning_rate "
    "or model.dtype float32, or look for a NaN in the base model"
)


def _mean(losses: Sequence[float]) -> float | None:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else None
