"""SAM-PARSER (arXiv 2308.14604): `W' = U diag(σ') Vᵀ`, so `y = W x + U(Δ ⊙ Vᵀ x)`, `Δ = σ' - σ`.

The singular vectors of W stay, `σ' (k)` starts at σ and is not clamped. Δ is what is stored, since σ' in 16 bits would lose
what a step adds to it; files hold σ'. U and V are more values than W unless `top_k` cuts them (`spectral.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_subspace.subspace.blocks.spectral import REFUSALS, TOP_K, SpectrumLinear
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings


@register(
    MethodInfo(
        name="sam-parser",
        category="reconstruction, mode 1",
        reference="2308.14604",
        summary="the singular values of the frozen matrix trained, its singular vectors kept",
        learning_rate=LearningRate(5e-2, 5e-2, 1e-3, "as SVDiff's"),
        uses_dropout=True,
        statistic="full SVD",
        refusals=REFUSALS,
        options=TOP_K,
        count="min(d_in, d_out), or top_k",
    )
)
class SamParser(SpectrumLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.sam_parser_sigma = nn.Parameter(torch.zeros(self.terms()))

    def core(self) -> Tensor:
        return self.sam_parser_sigma

    def file_tensors(self) -> dict[str, Tensor]:
        return {"sam_parser_sigma": self.spectral_S + self.sam_parser_sigma.detach()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.sam_parser_sigma.data.copy_(tensors["sam_parser_sigma"].to(self.spectral_S) - self.spectral_S)
