"""The learning rate as a function of the step and the configuration, by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler

from dist_subspace.config.schema import TrainingSection
from dist_subspace.errors import UsageError

PLATEAU = "reduce_lr_on_plateau"
_WITHOUT_WARMUP = (PLATEAU, "constant")
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")  # transformers drops theirs in silence
# What a plateau schedule has learned on its way.
_LISTENED = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
_LOOKED_AT = 1000  # steps, to find out whether there is one with a rate above 0


class Schedule:
    """Learning rates of the optimizer's groups at a step that can be set.

    Only a plateau schedule has a state, which it takes from evaluations; the others are Hugging Face's functions of the
    number of steps that were made. `warmup_steps` below 1 is a share of all steps.
    """

    def __init__(
        self, name: str, rates: list[float], warmup_steps: float, total_steps: int, options: Mapping[str, Any]
    ) -> None:
        """Raises UsageError for options that the schedule does not take, or lacks."""
        if options and name in _WITHOUT_OPTIONS:
            raise UsageError(
                f"training.lr_scheduler_kwargs is {dict(options)!r}, and the schedule {name!r} has no options; accepted: none"
            )
        groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
        self._optimizer = torch.optim.SGD(groups, lr=rates[0])  # of its own: the real one is not touched
        self.name, self._bases, self._step = name, list(rates), 0
        try:
            self._scheduler: Any = get_scheduler(
                name,
                self._optimizer,
                num_warmup_steps=warmup_count(warmup_steps, total_steps),
                num_training_steps=total_steps,
                scheduler_specific_kwargs=dict(options),
            )
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"training.lr_scheduler_kwargs is {dict(options)!r}, with which there is no schedule {name!r}: {error}"
            ) from error

    @property
    def rates(self) -> list[float]:
        """The learning rate of each group for the step that comes."""
        return self.at(self._step)

    def at(self, steps: int) -> list[float]:
        """The learning rates after so many steps."""
        if self.name == PLATEAU:
            return [float(group["lr"]) for group in self._optimizer.param_groups]
        functions = zip(self._bases, self._scheduler.lr_lambdas, strict=True)
        return [float(base * function(steps)) for base, function in functions]

    def advance(self) -> None:
        """One optimizer step is done."""
        self._step += 1

    def evaluated(self, loss: float) -> None:
        """An evaluation is done; only a plateau schedule listens."""
        if self.name == PLATEAU:
            self._scheduler.step(loss)

    def state(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        learned = {key: getattr(self._scheduler, key) for key in _LISTENED} if self.name == PLATEAU else {}
        return {
            "name": self.name,
            "rates": self.rates,
            "bases": self._bases,
            "scheduler": {"last_epoch": self._step} | learned,
        }

    def restore(self, state: Mapping[str, Any], steps: int) -> None:
        """Go on after so many steps. A plateau schedule takes what it had learned from `state`: how far it had lowered the
        rates, which apart from that are the configuration's."""
        self._step = steps
        learned = state.get("scheduler", {})
        if self.name != PLATEAU or "num_bad_epochs" not in learned:
            return
        for key in _LISTENED:
            if learned[key] is not None:  # `best` is infinite, which JSON has as null, until a loss was finite
                setattr(self._scheduler, key, learned[key])
        before = state.get("bases", self._bases)  # an older checkpoint has none: then they are taken as unchanged
        for group, base, old, rate in zip(
            self._optimizer.param_groups, self._bases, before, state["rates"], strict=True
        ):
            group["lr"] = rate if base == old else base * rate / old


def schedule_of(training: TrainingSection, total_steps: int, rates: list[float] | None = None) -> Schedule:
    """The schedule of a configuration, for groups with these rates; unset: for one with the configuration's.

    Raises:
        UsageError: options that it does not take.
    """
    return Schedule(
        training.lr_scheduler_type,
        rates or [training.rate],
        training.warmup_steps,
        total_steps,
        training.lr_scheduler_kwargs,
    )


def warmup_count(warmup_steps: float, total_steps: int) -> int:
    """Steps of warm-up; a value below 1 is a share of all, rounded up as Hugging Face does."""
    return -int(-warmup_steps * total_steps // 1) if 0 < warmup_steps < 1 else int(warmup_steps)


def warmup_warning(schedule: Schedule, warmup_steps: float, done: int, total_steps: int) -> str | None:
    """A sentence where the steps that come never leave the warm-up, or have no rate at all; None elsewhere."""
    count = warmup_count(warmup_steps, total_steps)
    if done >= total_steps or schedule.name in _WITHOUT_WARMUP:
        return None
    stride = max(1, (total_steps - done) // _LOOKED_AT)
    highest = max(max(schedule.at(step)) for step in (*range(done, total_steps, stride), total_steps - 1))
    if highest > 0 and (count < total_steps or warmup_steps < 1):
        return None
    shown = f"training.warmup_steps is {warmup_steps:g}"
    shown += f", which is {count:,} of {total_steps:,} steps" if 0 < warmup_steps < 1 else f" of {total_steps:,} steps"
    if highest == 0:
        return f"{shown}: the learning rate of every step is 0, and nothing is trained; set training.warmup_steps=0"
    return f"{shown}: the run ends in its warm-up, with a learning rate of at most {highest:.3g}"
