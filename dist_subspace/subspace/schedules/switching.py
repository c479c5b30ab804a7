"""LoRA-Dash's plan (arXiv 2409.01035; docs/methods.md, "LoRA-Dash's switch"): once, after a warm-up, the directions that are
trained from then on are chosen. Optimizer steps are counted, not forward calls, and the phase is part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.subspace.core.schedule import Edit, Schedule, Scheduled
from dist_subspace.subspace.core.statistic import Decomposes

WARMUP = 100  # or a third of a run that is shorter than three times that


class SwitchingPart(Decomposes, Scheduled):
    """A part that finds its directions at the switch."""

    chosen: bool = False  # whether it has them, and no longer zeros


class SwitchingSchedule(Schedule):
    switched: int | None = None  # the step after which it was

    def check(self, max_steps: int) -> None:
        warmup = self.warmup(max_steps)
        if warmup >= max_steps:
            raise UsageError(
                f"subspace.options.warmup_steps is {warmup}, which leaves no step of max_steps {max_steps} for the directions; "
                f"accepted: below {max_steps}"
            )

    def warmup(self, max_steps: int) -> int:
        given = self.settings.options["warmup_steps"]
        return min(WARMUP, max_steps // 3) if given is None else given

    def decomposes(self, step: int, max_steps: int) -> bool:
        """Not where an adapter was loaded that has its directions: its strengths belong to those."""
        chosen = any(isinstance(part, SwitchingPart) and part.chosen for part in self.parts.values())
        return not chosen and self.switched is None and step >= self.warmup(max_steps)

    def reads_parameters(self, step: int, max_steps: int) -> bool:
        return self.decomposes(step, max_steps)

    def advance(self, step: int, max_steps: int, gradients: Mapping[str, Tensor]) -> list[Edit]:
        if self.switched is None and step >= self.warmup(max_steps):
            self.switched = step
        return []

    def state(self) -> dict[str, Any]:
        return {"phase": 1 if self.switched is None else 2, "switched": self.switched, "begun": self.begun}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The directions are in the adapter's own file, zeros before the switch."""
        self.switched, self.begun = state.get("switched"), state.get("begun")
        for name, part in self.parts.items():
            assert isinstance(part, SwitchingPart)
            factors = {factor: f"{name}.{factor}" for factor in ("dash_U", "dash_V")}
            if self.switched is not None or all(key in tensors for key in factors.values()):
                part.set_factors({factor: tensors[key] for factor, key in factors.items()})
