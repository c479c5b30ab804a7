"""Spectral Adapter, additive (arXiv 2405.13952): `W' = (U_r + P) Σ_r (V_r + Q)ᵀ + W_rest`, without a factor γ.

    y = W x + (U_r + P)(σ_r ⊙ (V_r + Q)ᵀ x) - U_r(σ_r ⊙ V_rᵀ x)

`P (d_out, r)` and `Q (d_in, r)` zero at the start. What is computed is `P(σ_r ⊙ (V_r + Q)ᵀ x) + U_r(σ_r ⊙ Qᵀ x)`
(`deviation.py`). The result depends on the signs of the vectors, so a rule settles them, and the file holds what was used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.subspace.blocks.deviation import DeviationUpdate, FrozenPair, weighted, wide
from dist_subspace.subspace.blocks.spectral import SpectralLinear
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings

NO_PATTERN = "its factors are shifts of singular vectors, zero at the start"


@register(
    MethodInfo(
        name="spectral-additive",
        category="combination",
        reference="2405.13952",
        summary="the largest singular vectors shifted: (U_r + P) Σ_r (V_r + Q)ᵀ",
        learning_rate=LearningRate(3e-3, 3e-3, 2e-4, "as LoRA's"),
        uses_rank=True,
        rank=8,
        uses_alpha=False,
        uses_dropout=True,
        statistic="top-r SVD",
        refusals=dict.fromkeys(("mpc_o", "mpc_d", "mpc_n"), NO_PATTERN),
        count="r (d_in + d_out)",
    )
)
class SpectralAdditive(SpectralLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.spectral_P = nn.Parameter(torch.zeros(self.out_features, settings.rank))
        self.spectral_Q = nn.Parameter(torch.zeros(self.in_features, settings.rank))

    def held(self, factor: Tensor) -> nn.Parameter:
        return nn.Parameter(factor, requires_grad=False)  # on the part itself, for the one function that reads both

    def frozen_pair(self) -> FrozenPair:
        return self.spectral_V, self.spectral_U, self.spectral_S

    def transform(self, x: Tensor) -> Tensor:
        z, dropout = self.base(x), self.settings.dropout if self.training else 0.0
        return DeviationUpdate.apply(z, x, self.spectral_Q.t(), self.spectral_P, self, False, dropout)

    def update(self) -> tuple[Tensor, Tensor]:
        q, p, u = wide(self.spectral_Q).t(), wide(self.spectral_P), wide(self.spectral_U)
        right = [weighted(side, wide(self.spectral_S)) for side in (wide(self.spectral_V) + q, q)]
        return torch.cat(right), torch.cat([p, u], 1)
