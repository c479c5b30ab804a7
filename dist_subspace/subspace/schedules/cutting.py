"""AdaLoRA's plan (arXiv 2303.10512; docs/methods.md, "AdaLoRA's budget"): the number of triplets of the whole model shrinks,
and E is zeroed where the score is lowest.

After each step every entry's importance is smoothed; a triplet's score is E's plus the mean of A's row plus the mean of B's
column. With t_i steps of warm-up, t_f final ones, T in all and `p = (t - t_i) / (T - t_f - t_i)`, the budget goes from b₀, the
triplets at the start, to the target b_T: `int(b_T + (b₀ - b_T) (1 - p)³)`. In the final phase scores are frozen, and E is zeroed
after every step; before, a triplet whose E was zeroed may grow again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.schedule import Edit, Phases, Schedule, phases_of
from dist_subspace.subspace.core.spec import Settings
from dist_subspace.subspace.schedules.importance import Importance

DECISIONS = 100  # in a run, where no interval is given


class CuttingSchedule(Schedule):
    needs_gradients = True

    def __init__(self, parts: Mapping[str, SubspacePart], settings: Settings, seed: int = 0) -> None:
        super().__init__(parts, settings, seed)
        self.importance = Importance(settings.options["beta1"], settings.options["beta2"])
        self.start = sum(len(part.get_parameter("lora_E")) for part in parts.values())
        self.target = sum(part.settings.rank for part in parts.values())
        self._final: dict[str, Tensor] | None = None

    def phases(self, max_steps: int) -> Phases:
        return phases_of(self.settings.options, max_steps, DECISIONS)

    def check(self, max_steps: int) -> None:
        self.phases(max_steps)

    def uses_gradients(self, step: int, max_steps: int) -> bool:
        return step < max_steps - self.phases(max_steps).final

    def reads_parameters(self, step: int, max_steps: int) -> bool:
        return self.uses_gradients(step, max_steps)

    def budget(self, step: int, max_steps: int) -> int:
        """How many triplets of the whole model are left after this step."""
        phases = self.phases(max_steps)
        if step <= phases.warmup:
            return self.start
        left = 0.0 if phases.at_end(step) else (1 - phases.progress(step)) ** 3
        return int(self.target + (self.start - self.target) * left)

    def advance(self, step: int, max_steps: int, gradients: Mapping[str, Tensor]) -> list[Edit]:
        if self.uses_gradients(step, max_steps):
            for name, gradient in gradients.items():
                part, _, factor = name.rpartition(".")
                self.importance.update(name, self.parts[part].get_parameter(factor), gradient)
        phases = self.phases(max_steps)
        zeroed: dict[str, Tensor] = {}
        if phases.at_end(step):
            zeroed = self._final = self.zeroed(self.target) if self._final is None else self._final
        elif phases.decides(step):
            zeroed = self.zeroed(self.budget(step, max_steps))
        return [Edit(self.parts[name].get_parameter("lora_E"), where, 0.0) for name, where in zeroed.items()]

    def zeroed(self, budget: int) -> dict[str, Tensor]:
        """Where E becomes zero, by part: bool `(r,)` on the CPU; parts that keep all are left out."""
        if not self.importance or budget >= self.start:
            return {}
        masks = lowest([self.score(name) for name in self.parts], self.start - budget)
        return {name: mask for name, mask in zip(self.parts, masks, strict=True) if bool(mask.any())}

    def score(self, name: str) -> Tensor:
        """`(r,)`: a score for each triplet of a part."""
        score = self.importance.score
        return score(f"{name}.lora_E") + score(f"{name}.lora_A").mean(1) + score(f"{name}.lora_B").mean(0)

    def tensors(self) -> dict[str, Tensor]:
        return self.importance.tensors()

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.importance.restore(tensors)
        self._final = None


def lowest(scores: list[Tensor], count: int) -> Sequence[Tensor]:
    """Where the scores are at most the `count`-th smallest of all, bool like each of them, on the CPU; count is at least 1."""
    flat = torch.cat(scores).cpu()
    return torch.split(flat <= flat.kthvalue(count).values, [len(score) for score in scores])
