"""TriLoRA (arXiv 2405.11236; arXiv 2407.05417, section IV): `y = W x + γ B (E ⊙ (A D(x)))`, `γ = α / r`, or 1 as in one of the
published codes (`scale`).

`E (r)` zero: identity at the start. `A (r, d_in)` and `B (d_out, r)` Kaiming-uniform with a = √5, both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.options import choice
from dist_subspace.subspace.blocks.low_rank import LowRankLinear, kaiming_uniform
from dist_subspace.subspace.core.learning_rate import Factors, LearningRate, by_alpha, by_rank
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings


def _effect(settings: Factors) -> float:
    return by_rank(settings) if settings.options["scale"] == 1 else by_alpha(settings)


@register(
    MethodInfo(
        name="trilora",
        category="extension",
        reference="2405.11236",
        summary="LoRA with a diagonal between its factors: W + (α/r) B diag(E) A",
        learning_rate=LearningRate(
            5e-3, 5e-3, 5e-4, "between LoRA's and AdaLoRA's", effect=_effect, effect_text="√(γ r)"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=("mpc_o", "mpc_d", "mpc_n"),
        options={"scale": choice("alpha/r", "γ, which multiplies the update", 1)},
        count="r (d_in + d_out) + r",
    )
)
class TriLora(LowRankLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        self.lora_E = nn.Parameter(torch.zeros(settings.rank))

    def scaling(self, settings: Settings) -> float:
        return 1.0 if settings.options["scale"] == 1 else super().scaling(settings)

    def initial_b(self, settings: Settings, generator: torch.Generator) -> Tensor:
        return kaiming_uniform(self.out_features, settings.rank, generator)

    def core(self) -> Tensor:
        return self.lora_E
