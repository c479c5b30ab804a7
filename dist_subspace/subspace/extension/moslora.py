"""MoSLoRA, mixed subspaces (arXiv 2406.11909): `y = W x + γ B (G (A D(x)))`, `γ = α / r`.

`B (d_out, r)` zero: identity at the start. `A (r, d_in)` and the mixer `G (r, r)` Kaiming-uniform with a = √5; or G a random
orthogonal matrix. What sets it apart from FLoRA is which factor is zero at the start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.options import choice
from dist_subspace.subspace.blocks.low_rank import LowRankLinear, kaiming_uniform
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings


@register(
    MethodInfo(
        name="moslora",
        category="extension",
        reference="2406.11909",
        summary="LoRA whose subspaces are mixed by a trained matrix: W + (α/r) B G A",
        learning_rate=LearningRate(
            3e-3, 3e-3, 3e-4, "LLaMA-3-8B in the method's repository", effect=by_alpha, effect_text="√α"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=("mpc_o", "mpc_d", "mpc_n"),
        options={"mixer": choice("kaiming", "initial values of G", "orthogonal")},
        count="r (d_in + d_out) + r²",
    )
)
class MosLora(LowRankLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        random = orthogonal if settings.options["mixer"] == "orthogonal" else square_kaiming
        self.lora_G = nn.Parameter(random(settings.rank, generator))

    def core(self) -> Tensor:
        return self.lora_G


def square_kaiming(size: int, generator: torch.Generator) -> Tensor:
    return kaiming_uniform(size, size, generator)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform over all of them: the QR factor whose R has a positive diagonal."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    uniform: Tensor = q * r.diagonal().sign()
    return uniform.float()
