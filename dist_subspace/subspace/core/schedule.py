"""A method's plan over the steps of a run: what it decides after each optimizer step, and what of it a checkpoint holds.

Everything a plan works on is allocated at attach, at its final shape; a decision is a list of edits, written in place into
the parameter, its master copy and, where asked, its moments. Decisions are functions of gradients that all ranks have
averaged, so every rank comes to the same ones. t counts the steps of the run: the first is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.options import Option, steps
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.spec import Settings


@dataclass(frozen=True)
class Edit:
    """Write `value` over the places of a trained parameter where `where` (bool, broadcast to its shape) is true; with
    `moments`, the optimizer's moments there become zero."""

    parameter: nn.Parameter
    where: Tensor
    value: Tensor | float
    moments: bool = False


class Schedule:
    """One plan for all parts of a model.

    seed: of the run; what a plan draws is a function of it, of the layer's name and of the step.
    begun: how many steps the optimizer had counted when it began anew for `late_parameters`; None where it did not.
    has_advanced: whether a loop has moved it on.
    """

    needs_gradients = False

    def __init__(self, parts: Mapping[str, SubspacePart], settings: Settings, seed: int = 0) -> None:
        self.parts, self.settings, self.seed = dict(parts), settings, seed
        self.begun: int | None = None
        self.has_advanced = False

    def check(self, max_steps: int) -> None:
        """Raises UsageError where the plan's lengths do not fit into `max_steps`."""

    def uses_gradients(self, step: int, max_steps: int) -> bool:
        """Whether the gradients of this step are asked for."""
        return self.needs_gradients

    def reads_parameters(self, step: int, max_steps: int) -> bool:
        """Whether `advance` looks at the parts' trained values after this step."""
        return True

    def advance(self, step: int, max_steps: int, gradients: Mapping[str, Tensor]) -> list[Edit]:
        """Local, alike on every rank: what follows from completed step `step` (the first is 1); parameters are whole.

        gradients: by parameter name (`PART.own`), the mean over the global batch, float32, free of loss scaling; empty for
        a plan that needs none, and after a step whose gradients were not finite.
        """
        raise TypeError(f"{type(self).__name__} decides nothing")

    def decomposes(self, step: int, max_steps: int) -> bool:
        """Whether this step calls for the parts' `decompose` and `set_factors`, before `advance`."""
        return False

    def late_parameters(self) -> list[nn.Parameter]:
        """What is trained from the decomposition on: the optimizer's step counters for them begin anew then."""
        parts = self.parts.values()
        return [p for part in parts for n, p in part.trainables().items() if n in late_factors_of(type(part))]

    def state(self) -> dict[str, Any]:
        """Numbers for trainer_state.json."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint, by parameter name and purpose (`PART.own.purpose`)."""
        return {}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state` and `tensors`; the adapter file's tensors are given too (`PART.suffix`)."""


class Scheduled(SubspacePart):
    """A method with a plan over the steps.

    late_factors: its parameters that are trained from a later step on. They have an optimizer group of their own, because an
        optimizer that flattens its groups counts the steps of a group, and theirs begin anew then.
    """

    schedule_class: ClassVar[type[Schedule]]
    late_factors: ClassVar[tuple[str, ...]] = ()


def schedule_class_of(method: type[SubspacePart]) -> type[Schedule] | None:
    """The class of the method's plan; None where it has none."""
    return method.schedule_class if issubclass(method, Scheduled) else None


def late_factors_of(method: type[SubspacePart]) -> tuple[str, ...]:
    """The names of what the method trains from a later step on."""
    return method.late_factors if issubclass(method, Scheduled) else ()


@dataclass(frozen=True)
class Phases:
    """`warmup` steps without a decision, `final` ones without a change at the end, a decision each `interval` between."""

    warmup: int
    final: int
    interval: int
    total: int

    def progress(self, step: int) -> float:
        """From 0 at the end of the warm-up to 1 where the final phase begins."""
        return (step - self.warmup) / (self.total - self.final - self.warmup)

    def at_end(self, step: int) -> bool:
        return step > self.total - self.final

    def decides(self, step: int) -> bool:
        return self.warmup < step <= self.total - self.final and step % self.interval == 0


def phase_options(what: str, decisions: int) -> dict[str, Option]:
    """The options that `phases_of` reads."""
    return {
        "warmup_steps": steps(None, f"before the first {what}; unset: 10 % of max_steps"),
        "final_steps": steps(None, f"without a {what} at the end; unset: 30 % of max_steps"),
        "interval": steps(None, f"from one {what} to the next; unset: max_steps // {decisions}, at least 1", least=1),
    }


def phases_of(options: Mapping[str, Any], max_steps: int, decisions: int) -> Phases:
    """The phases of a run of `max_steps`, with options that are unset filled in.

    Raises:
        UsageError: warm-up and final phase leave no step between them.
    """
    warmup = _given(options["warmup_steps"], lambda: max_steps // 10)
    final = _given(options["final_steps"], lambda: max_steps * 3 // 10)
    if warmup + final >= max_steps:
        shown = " and ".join(
            f"subspace.options.{n} is {v}" for n, v in (("warmup_steps", warmup), ("final_steps", final))
        )
        raise UsageError(f"{shown}, which leaves no step of max_steps {max_steps} between; accepted: a sum below it")
    return Phases(warmup, final, _given(options["interval"], lambda: max(1, max_steps // decisions)), max_steps)


def _given(value: int | None, default: Callable[[], int]) -> int:
    return default() if value is None else value
