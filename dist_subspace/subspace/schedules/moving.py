"""FlexLoRA's plan (arXiv 2601.22905; docs/methods.md, "FlexLoRA's moves"): triplets move from layers of low to layers of high
importance.

A layer's importance is the entropy of `p_i = E_i² / Σ E²` over log r. At each decision the b layers of lowest importance lose the
triplet of smallest |E_i|, and the b of highest gain one with E = 0, so that no output changes;
`b = round(b₀ (1 - p)³)` with p the progress between warm-up and final phase. The sum of all ranks stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.subspace.attach import seed_of
from dist_subspace.subspace.blocks.triplets import new_vectors
from dist_subspace.subspace.core.schedule import Edit, Phases, Schedule, phases_of

DECISIONS = 50  # in a run, where no interval is given
EPSILON = 1e-8


class MovingSchedule(Schedule):
    def phases(self, max_steps: int) -> Phases:
        return phases_of(self.settings.options, max_steps, DECISIONS)

    def check(self, max_steps: int) -> None:
        self.phases(max_steps)

    def reads_parameters(self, step: int, max_steps: int) -> bool:
        return self.phases(max_steps).decides(step)

    def advance(self, step: int, max_steps: int, gradients: Mapping[str, Tensor]) -> list[Edit]:
        phases = self.phases(max_steps)
        if not phases.decides(step):
            return []
        active, values = self._active_cores()
        if not all(bool(value.any()) for value in values):  # a layer that has not begun to train has no entropy
            return []
        ranks, free = [len(value) for value in values], [int((~mask).sum()) for mask in active]
        count = moves(self.settings.options["budget"], phases.progress(step))
        losing, gaining = choose([importance(value) for value in values], ranks, free, count)
        names = list(self.parts)
        lost = [self._lose(names[i], int(active[i].nonzero().flatten()[weakest(values[i])])) for i in losing]
        gained = [self._gain(names[i], int((~active[i]).nonzero()[0]), step) for i in gaining]
        return [edit for edits in (*lost, *gained) for edit in edits]

    def _active_cores(self) -> tuple[list[Tensor], list[Tensor]]:
        """Each part's mask, and its E where that is true, float64; on the CPU."""
        cores = [self._parameter(name, "lora_E").detach().double() for name in self.parts]
        split = torch.cat(cores).cpu().split([len(core) for core in cores])
        active = [self._mask(name).cpu() for name in self.parts]
        return active, [core[mask] for core, mask in zip(split, active, strict=True)]

    def _lose(self, name: str, place: int) -> list[Edit]:
        mask = self._mask(name)
        mask[place] = False
        return [Edit(self._parameter(name, "lora_E"), _only(place, len(mask)), 0.0, moments=True)]

    def _gain(self, name: str, place: int, step: int) -> list[Edit]:
        """New vectors with the spread of the first ones; E = 0 leaves the output as it is."""
        mask, a, b = self._mask(name), self._parameter(name, "lora_A"), self._parameter(name, "lora_B")
        mask[place] = True
        where = _only(place, len(mask))
        generator = torch.Generator().manual_seed(seed_of(self.seed, f"{name}:{step}"))
        return [
            Edit(a, where[:, None], new_vectors(1, a.shape[1], generator), moments=True),
            Edit(b, where[None], new_vectors(b.shape[0], 1, generator), moments=True),
            Edit(self._parameter(name, "lora_E"), where, 0.0, moments=True),
        ]

    def _parameter(self, name: str, factor: str) -> nn.Parameter:
        return self.parts[name].get_parameter(factor)

    def _mask(self, name: str) -> Tensor:
        return self.parts[name].get_buffer("active")

    def state(self) -> dict[str, Any]:
        masks = {name: self._mask(name).tolist() for name in self.parts}
        return {"active": {name: "".join("1" if flag else "0" for flag in flags) for name, flags in masks.items()}}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name, flags in state.get("active", {}).items():
            self._mask(name).copy_(torch.tensor([flag == "1" for flag in flags]))


def moves(budget: int, progress: float) -> int:
    """`round(b₀ (1 - p)³)`, half to even."""
    return round(budget * (1 - progress) ** 3)


def importance(core: Tensor) -> float:
    """The entropy of a layer's `E² / Σ E²` over log r, within 0 and 1; 0 for one triplet. `core (r,)` float64, not all zero."""
    if len(core) == 1:
        return 0.0
    shares = core.square() / core.square().sum()
    entropy = -float((shares * (shares + EPSILON).log()).sum()) / math.log(len(core))
    return min(1.0, max(0.0, entropy))


def choose(
    values: Sequence[float], ranks: Sequence[int], free: Sequence[int], count: int
) -> tuple[list[int], list[int]]:
    """The layers that lose and that gain a triplet: as many of each, none in both.

    Arguments:
        values: importance by layer; ranks: active triplets; free: inactive ones; count: b.
    """
    layers = range(len(values))
    losing = sorted((i for i in layers if ranks[i] > 1), key=lambda i: values[i])[:count]
    gaining = sorted((i for i in layers if free[i] > 0), key=lambda i: -values[i])[:count]
    both = set(losing) & set(gaining)
    losing, gaining = [i for i in losing if i not in both], [i for i in gaining if i not in both]
    number = min(len(losing), len(gaining))
    return losing[:number], gaining[:number]


def weakest(core: Tensor) -> int:
    """The place of the smallest |E_i|, the last of equals."""
    return len(core) - 1 - int(core.abs().flip(0).argmin())


def _only(place: int, length: int) -> Tensor:
    return torch.arange(length) == place
