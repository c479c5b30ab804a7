"""SVDiff (arXiv 2303.11305): `W' = U diag(σ') Vᵀ` with `σ' = ReLU(σ + c δ)`, so `y = W x + U(Δ ⊙ Vᵀ x)`, `Δ = max(c δ, -σ)`.

`δ (k)` zero at the start; the gradient of a direction is zero while `σ + c δ < 0`. c is the option `strength`, 1 in training.
U and V are more values than W unless `top_k` cuts them (`spectral.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.options import number
from dist_subspace.subspace.blocks.spectral import REFUSALS, TOP_K, SpectrumLinear
from dist_subspace.subspace.core.learning_rate import LearningRate, by_option
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings


@register(
    MethodInfo(
        name="svdiff",
        category="combination",
        reference="2303.11305",
        summary="a shift of each singular value of the frozen matrix, which stays above zero",
        learning_rate=LearningRate(
            5e-2, 5e-2, 1e-3, "the paper's on Stable Diffusion", effect=by_option("strength"), effect_text="strength"
        ),
        uses_dropout=True,
        statistic="full SVD",
        refusals=REFUSALS,
        options={**TOP_K, "strength": number(1.0, "c, what the shifts are multiplied by", least=0)},
        count="min(d_in, d_out), or top_k",
    )
)
class Svdiff(SpectrumLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.svdiff_delta = nn.Parameter(torch.zeros(self.terms()))

    def core(self) -> Tensor:
        shift = self.settings.options["strength"] * self.svdiff_delta
        # At the bound itself the gradient passes: a singular value of zero may still grow.
        return torch.where(shift >= -self.spectral_S, shift, -self.spectral_S)
