"""Which evaluation is the best, and when a run ends for want of a better one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.training.best import (
    check_measured,
    chosen_text,
    is_out_of_patience,
    note_evaluation,
    stopped_early_text,
)
from dist_subspace.training.progress import Progress


def configuration(patience: int | None = None, metric: str | None = None, greater: bool | None = None) -> Any:
    return load_config(
        {
            "model": {"path": "m"},
            "data": {"train": "t.jsonl", "eval": "e.jsonl"},
            "training": {"early_stopping_patience": patience},
            "checkpoint": {"metric_for_best_model": metric, "greater_is_better": greater},
        }
    )


def after(losses: list[float], config: Any, name: str = "eval_loss") -> tuple[Progress, int | None]:
    """The progress after these evaluations, one a step from step 0 on, and the step at which the run ends."""
    progress = Progress()
    for step, loss in enumerate(losses):
        progress.step = step
        note_evaluation(progress, config, {name: loss, "eval_other": 0.5})
        if is_out_of_patience(progress, config):
            return progress, step
    return progress, None


@pytest.mark.parametrize(
    ("patience", "losses", "ends", "best"),
    [
        (2, [9.0, 3.0, 2.0, 2.5, 2.5, 1.0], 4, 2),
        (2, [1.0, 3.0, 2.0, 2.5, 1.5, 1.6, 1.5], 6, 4),  # before training it was better, and nobody may choose that
        (1, [9.0, 3.0, 3.0], 2, 1),  # equal is not better
        (3, [9.0, 3.0, float("nan"), float("inf"), 2.0], None, 4),
        (2, [9.0, float("nan"), float("nan"), 1.0], 2, None),
        (None, [9.0, 3.0, 4.0, 5.0, 6.0], None, None),
    ],
)
def test_a_run_ends_after_so_many_evaluations_in_a_row_that_bring_nothing_better(
    patience: int | None, losses: list[float], ends: int | None, best: int | None
) -> None:
    progress, ended = after(losses, configuration(patience))
    assert ended == ends
    assert (progress.best or {}).get("step") == best


def test_a_metric_that_shall_rise_or_is_said_to_does() -> None:
    rising, ended = after([0.1, 0.5, 0.4, 0.6, 0.5, 0.5], configuration(2, "accuracy"), "eval_accuracy")
    assert (ended, rising.best) == (5, {"metric": "eval_accuracy", "value": 0.6, "step": 3})
    turned, _ = after([0.1, 0.5, 0.4, 0.6], configuration(9, "loss", True))
    assert turned.best is not None and turned.best["step"] == 3
    falling, _ = after([9.0, 5.0, 4.0, 6.0], configuration(None, "eval_perplexity"), "eval_perplexity")
    assert falling.best is not None and falling.best["step"] == 2


def test_a_metric_that_is_not_measured_is_refused_before_a_step_is_made() -> None:
    with pytest.raises(UsageError, match="metric_for_best_model is 'bleu'; measured here: eval_loss, eval_other"):
        after([1.0], configuration(None, "bleu"))


def test_another_metric_than_the_one_so_far_is_chosen_by_anew() -> None:
    progress, _ = after([9.0, 1.0, 2.0], configuration(None, "loss"))
    note_evaluation(progress, configuration(None, "accuracy"), {"eval_accuracy": 0.2})
    assert progress.best == {"metric": "eval_accuracy", "value": 0.2, "step": 2} and progress.stale == 0


def test_what_asks_for_evaluations_needs_something_to_evaluate_on() -> None:
    nothing = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    check_measured(load_config(nothing))
    check_measured(configuration(2, "loss"))
    for given in ({"training": {"early_stopping_patience": 3}}, {"checkpoint": {"metric_for_best_model": "f1"}}):
        with pytest.raises(UsageError, match=r"but data\.eval is null"):
            check_measured(load_config(nothing | given))


def test_what_the_adapter_is_and_why_a_run_ended_is_said() -> None:
    progress, _ = after([9.0, 3.0, 2.0, 2.5, 2.5], configuration(2))
    assert stopped_early_text(progress) == (
        "stopped early after step 4: 2 evaluations without a better eval_loss than 2 of step 2"
    )
    assert chosen_text(progress, Path("run/checkpoint-2")) == "of checkpoint-2, the best by eval_loss: 2"
    assert chosen_text(Progress(step=9), Path("run/checkpoint-9")) == "of checkpoint-9, the last"
    lost, _ = after([9.0, float("nan")], configuration(1))
    assert stopped_early_text(lost) == "stopped early after step 1: 1 evaluation without a finite metric"
