"""FlexLoRA (arXiv 2601.22905): `y = W x + γ B (E ⊙ (A D(x)))`, `γ = α / r`, with triplets that move between layers.

`E` zero: identity at the start; A and B ~ N(0, 0.02²), kept near orthogonal by MPC_o. `max_rank` triplets a layer are allocated,
`rank` of them active at the start; layers whose E has little entropy lose some to layers with much (schedules/moving.py). An
inactive triplet has no part in anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_subspace.options import whole
from dist_subspace.subspace.blocks.triplets import TripletLinear
from dist_subspace.subspace.core.constraints import constraint_options
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.schedule import Scheduled, phase_options
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.schedules.moving import DECISIONS, MovingSchedule
from dist_subspace.torch_internals import version

CONSTRAINTS = ("mpc_o", "mpc_d", "mpc_n")


@register(
    MethodInfo(
        name="flexlora",
        category="extension",
        reference="2601.22905",
        summary="triplets B diag(E) A that move from layers of low to layers of high entropy",
        learning_rate=LearningRate(3e-2, 1e-2, 1e-3, "as AdaLoRA's", effect=by_alpha, effect_text="√α"),
        uses_rank=True,
        rank=8,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=CONSTRAINTS,
        constraint="mpc_o",
        options={
            **constraint_options(CONSTRAINTS, power=1),
            "max_rank": whole(
                None, "triplets a layer that are allocated, at most its smaller side; unset: twice the rank"
            ),
            **phase_options("move", DECISIONS),
            "budget": whole(4, "triplets that move at the first decision"),
        },
        count="max_rank (d_in + d_out + 1)",
    )
)
class FlexLora(TripletLinear, Scheduled):
    schedule_class = MovingSchedule
    rows_option = "max_rank"
    active: Tensor

    @classmethod
    def rows_for(cls, rank: int) -> int:
        return 2 * rank

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        device = next(self.base.parameters()).device
        self.register_buffer("active", torch.arange(len(self.lora_E), device=device) < settings.rank)
        self._rows: tuple[int, Tensor] | None = None

    def core(self) -> Tensor:
        return self.lora_E * self.active

    def constrained_factors(self) -> tuple[Tensor, Tensor]:
        """Of the active triplets alone. Their places are looked up again when the mask was written to."""
        written = version(self.active)
        if self._rows is None or self._rows[0] != written or self._rows[1].device != self.active.device:
            self._rows = written, self.active.nonzero().flatten()
        rows = self._rows[1]
        return self.lora_A[rows], self.lora_B[:, rows]

    def file_tensors(self) -> dict[str, Tensor]:
        return {**super().file_tensors(), "active": self.active}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self.active.copy_(tensors["active"])
