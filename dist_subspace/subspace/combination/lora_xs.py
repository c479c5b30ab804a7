"""LoRA-XS (arXiv 2405.17604): `y = W x + γ B (R (A D(x)))`, `B = U_r Σ_r` and `A = V_rᵀ` frozen, `γ = α / r`.

Between the r largest singular triplets of W only the core `R (r, r)` is trained, whatever the layer's size. It is zero at the
start: exactly the identity. The paper draws it from N(0, σ²) with σ = 1e-5 (`init: normal`), which is close to it. The sign
that a pair of vectors has in common cancels in nothing that R has learned, so the file holds the vectors that were used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.options import choice
from dist_subspace.subspace.blocks.deviation import wide
from dist_subspace.subspace.blocks.spectral import REFUSALS, SpectralLinear
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings

STD = 1e-5


@register(
    MethodInfo(
        name="lora-xs",
        category="combination",
        reference="2405.17604",
        summary="a trained r x r core between frozen singular factors: W + (α/r) U_r Σ_r R V_rᵀ",
        learning_rate=LearningRate(1e-2, 1e-2, 1e-3, "the paper's on 7B models", effect=by_alpha, effect_text="√α"),
        uses_rank=True,
        rank=16,
        alpha_over_rank=1.0,
        uses_dropout=True,
        statistic="top-r SVD",
        refusals=REFUSALS,
        options={"init": choice("zero", "initial values of R; normal: N(0, 1e-10), as the paper has it", "normal")},
        count="r²",
    )
)
class LoraXs(SpectralLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.scale = settings.alpha / settings.rank
        core = torch.zeros(settings.rank, settings.rank)
        if settings.options["init"] == "normal":
            core.normal_(std=STD, generator=generator)
        self.lora_xs_R = nn.Parameter(core)

    def core(self) -> Tensor:
        """`γ Σ_r R`."""
        return self.scale * wide(self.spectral_S)[:, None] * wide(self.lora_xs_R)
