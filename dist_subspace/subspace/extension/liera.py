"""LieRA (arXiv 2504.00851): `y = (W ⊙ (1 + γ B A)) x`, the first-order form of `W ⊙ exp(γ B A)` (`form`), `γ = α / r`.

A and B start as LoRA's: identity. ΔW can have full rank; zeros of W stay. The update needs W entry by entry: the operator makes
`W ⊙ Δ` a few rows at a time (`Δ = γ B A`, or `exp(γ B A) - 1`) and applies it beside W, on `D(x)`. An entry of W costs `2t + r`
multiplications for t tokens, and r + 1 products (docs/methods.md, "liera") cost `(r + 1) t`: equal, but for one, for a single
token, and dearer from the second on. So there is this route alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_subspace.options import choice
from dist_subspace.subspace.blocks.dropout import drop
from dist_subspace.subspace.blocks.low_rank import LowRankPair
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo


@register(
    MethodInfo(
        name="liera",
        category="extension",
        reference="2504.00851",
        summary="each entry of W scaled by a low-rank matrix: W ⊙ (1 + (α/r) B A)",
        learning_rate=LearningRate(
            1e-2, 1e-2, 1e-3, "five times LoRA's: the update is multiplied by W", effect=by_alpha, effect_text="√α"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=("mpc_o", "mpc_d"),
        refusals={"mpc_n": "its update W ⊙ (γ B A) is not linear in x through B A alone"},
        options={"form": choice("first-order", "W ⊙ (1 + γ B A), or W ⊙ exp(γ B A)", "exp")},
        count="r (d_in + d_out)",
    )
)
class Liera(LowRankPair):
    def transform(self, x: Tensor) -> Tensor:
        dropout = self.settings.dropout if self.training else 0.0
        gate = LowRankGate(self.lora_A, self.lora_B, self.scale, self.settings.options["form"] == "exp")
        return self.base(x, gate, drop(x, dropout) if dropout else None)

    def merged(self, weight: Tensor) -> Tensor:
        exponent = self.delta().to(weight.device)
        return weight * (exponent.exp() if self.settings.options["form"] == "exp" else 1 + exponent)


class LowRankGate:
    """`Δ = γ B A`, or `exp(γ B A) - 1`, in rows; `A (r, d_in)`, `B (d_out, r)`."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, exponential: bool) -> None:
        self.factors: tuple[Tensor, ...] = (a, b)
        self.scale, self.exponential = scale, exponential

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        a, b = self.factors
        exponent = (b[rows] * self.scale).to(dtype) @ a.to(dtype)
        return exponent.expm1_() if self.exponential else exponent

    def gradients(self, tiles: Iterable[tuple[slice, Tensor]]) -> tuple[Tensor, Tensor]:
        a, b = self.factors
        grad_a, grad_b = torch.zeros_like(a, dtype=torch.float32), torch.zeros_like(b)
        for rows, grad in tiles:
            if self.exponential:
                grad = torch.addcmul(grad, grad, self.rows(rows, grad.dtype))
            grad_a += (b[rows] * self.scale).to(grad.dtype).t() @ grad
            grad_b[rows] = (grad @ a.to(grad.dtype).t()).to(b.dtype).mul_(self.scale)
        return grad_a.to(a.dtype), grad_b
