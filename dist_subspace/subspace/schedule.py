"""A method's plan over the steps of a run: what it decides after each optimizer step, and what of it a checkpoint holds.

Everything a plan works on is allocated at attach, at its final shape; a decision is a list of edits, written in place into
the parameter, its master copy and, where asked, its moments. Decisions are functions of gradients that all ranks have
averaged, so every rank comes to the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_subspace.subspace.method import Settings, SubspacePart


@dataclass(frozen=True)
class Edit:
    """Write `value` over the places of a trained parameter where `where` (bool, broadcast to its shape) is true; with
    `moments`, the optimizer's moments there become zero."""

    parameter: nn.Parameter
    where: Tensor
    value: Tensor | float
    moments: bool = False


class Schedule:
    """One plan for all parts of a model."""

    needs_gradients = False

    def __init__(self, parts: Mapping[str, SubspacePart], settings: Settings) -> None:
        self.parts, self.settings = dict(parts), settings

    def check(self, max_steps: int) -> None:
        """Raises UsageError where the plan's lengths do not fit into `max_steps`."""

    def advance(self, step: int, max_steps: int, gradients: Mapping[str, Tensor]) -> list[Edit]:
        """Local, alike on every rank: what follows from completed step `step` (the first is 1); parameters are whole.

        gradients: by parameter name (`PART.own`), the mean over the global batch, float32, free of loss scaling; empty for
        a plan that needs none.
        """
        raise TypeError(f"{type(self).__name__} decides nothing")

    def decomposes(self, step: int, max_steps: int) -> bool:
        """Whether this step calls for a decomposition of every layer's frozen matrix (`SubspacePart.direct`)."""
        return False

    def state(self) -> dict[str, Any]:
        """Numbers for trainer_state.json."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint, by parameter name and purpose."""
        return {}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state` and `tensors`."""
