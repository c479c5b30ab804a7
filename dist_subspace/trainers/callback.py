"""Moves a method's schedule on after each optimizer step of a Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from dist_subspace.advancing import advance
from dist_subspace.subspace import attached


class ScheduleCallback(TrainerCallback):
    """`advance` after each optimizer step: before it is logged, evaluated or saved. Methods without a schedule are let be."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises UsageError for lengths of the schedule that do not fit into the run's steps."""
        schedule = attached(model).schedule
        if schedule is not None:
            schedule.check(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        advance(model, state.global_step, state.max_steps)
