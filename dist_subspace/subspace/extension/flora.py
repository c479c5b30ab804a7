"""FLoRA, a low-rank core space (arXiv 2405.14739): `y = W x + γ B (G (A D(x)))`, `γ = α / r`.

`G (r, r)` zero: identity at the start. `A (r, d_in)` and `B (d_out, r)` Kaiming-uniform with a = √5, both.
Not to be confused with Flora (gradient compression) or federated FLoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.subspace.blocks.low_rank import LowRankLinear, kaiming_uniform
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings


@register(
    MethodInfo(
        name="flora",
        category="extension",
        reference="2405.14739",
        summary="LoRA with a full core between its factors, zero at the start: W + (α/r) B G A",
        learning_rate=LearningRate(5e-3, 5e-3, 2e-4, "as LoRA's", effect=by_alpha, effect_text="√α"),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=("mpc_o", "mpc_d", "mpc_n"),
        count="r (d_in + d_out) + r²",
    )
)
class Flora(LowRankLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        self.lora_G = nn.Parameter(torch.zeros(settings.rank, settings.rank))

    def initial_b(self, settings: Settings, generator: torch.Generator) -> Tensor:
        return kaiming_uniform(self.out_features, settings.rank, generator)

    def core(self) -> Tensor:
        return self.lora_G
