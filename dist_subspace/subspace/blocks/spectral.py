"""Corrections between singular vectors of a frozen matrix: `y = W x + U C Vᵀ x`, U and V frozen, the core C trained.

This is the two-sided form. The one-sided ones, `z + U((Δ/σ) ⊙ Uᵀz)` with `z = W x` and its mirror image, need half of the
vectors, but multiply the rounding of z by Δ/σ: where σ is small 16 bits do not survive that, and where it is zero nothing does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.options import Option, whole
from dist_subspace.subspace.blocks.deviation import wide
from dist_subspace.subspace.blocks.dropout import drop
from dist_subspace.subspace.blocks.sums import summed_product
from dist_subspace.subspace.blocks.svd import Triplets, every, largest
from dist_subspace.subspace.core.factors import FrozenFactor
from dist_subspace.subspace.core.forms import LowRankForm
from dist_subspace.subspace.core.operator import Weight
from dist_subspace.subspace.core.statistic import KeepsFactors
from dist_subspace.torch_internals import TensorFunction

NO_PATTERN = "what it trains lies between frozen singular vectors, which are orthonormal already"
REFUSALS = dict.fromkeys(("mpc_o", "mpc_d", "mpc_n"), NO_PATTERN)
TOP_K: dict[str, Option] = {"top_k": whole(None, "only so many of the largest singular values (null: all)")}


class SpectralLinear(KeepsFactors, LowRankForm):
    """Triplets `U (d_out, n)`, `σ (n)`, `Vᵀ (n, d_in)`, found at set-up; the adapter's file keeps the vectors that were used.

    U and V are in the computation's type, linear operators that are gathered where they are used. σ is float32 and whole on
    every rank: a file's form may need it where vectors are split.
    """

    kept_factors = ("spectral_U", "spectral_S", "spectral_V")
    spectral_U: Any
    spectral_S: Tensor
    spectral_V: Any

    def terms(self) -> int:
        """n: how many triplets, the largest first."""
        return self.settings.rank

    def triplets(self, weight: Weight) -> Triplets:
        return largest(weight.matrix, self.terms(), weight.generator)

    def decompose(self, weight: Weight) -> dict[str, Tensor]:
        triplets = self.triplets(weight)
        return {"spectral_U": triplets.u, "spectral_S": triplets.s, "spectral_V": triplets.v}

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        self.register_buffer("spectral_S", factors["spectral_S"].float().clone())  # a view would hold a mapped file
        for name in ("spectral_U", "spectral_V"):
            setattr(self, name, self.held(factors[name].to(self.compute_dtype).contiguous()))

    def held(self, factor: Tensor) -> nn.Module | nn.Parameter:
        return FrozenFactor(factor)

    def core(self) -> Tensor:
        """C, zero at the start: `(n,)` for a diagonal, or `(n, n)`."""
        raise TypeError(f"{type(self).__name__} does not say what lies between the vectors")

    def transform(self, x: Tensor) -> Tensor:
        z: Tensor = self.base(x)
        core = self.core()
        hidden: Tensor = self.spectral_V(drop(x, self.settings.dropout if self.training else 0.0))
        inner = Diagonal.apply(hidden, core) if core.dim() == 1 else functional.linear(hidden, core.to(hidden.dtype))
        update: Tensor = self.spectral_U(inner)
        return z + update

    def update(self) -> tuple[Tensor, Tensor]:
        """`(A (r', d_in), B (d_out, r'))` with `ΔW = B A`, in at least float32."""
        u, core = wide(self.spectral_U.matrix), wide(self.core())
        return wide(self.spectral_V.matrix), u * core if core.dim() == 1 else u @ core

    def merged(self, weight: Tensor) -> Tensor:
        a, b = self.update()
        return weight + (b @ a).to(weight.device)

    def low_rank_form(self) -> tuple[Tensor, Tensor]:
        a, b = self.update()
        return a.detach(), b.detach()


class SpectrumLinear(SpectralLinear):
    """A method that shifts singular values: all of them, or the `top_k` largest."""

    def terms(self) -> int:
        smaller = min(self.in_features, self.out_features)
        return min(self.settings.options["top_k"] or smaller, smaller)

    @property
    def setup_statistic(self) -> str:
        return self.info.statistic if self.settings.options["top_k"] is None else "top-k SVD"

    def triplets(self, weight: Weight) -> Triplets:
        return every(weight.matrix) if self.terms() == min(weight.matrix.shape) else super().triplets(weight)


class Diagonal(TensorFunction):
    """`Δ ⊙ h` for `h (..., k)` and `Δ (k,)`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(h, delta)
        return h * delta.to(h.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        h, delta = ctx.saved_tensors
        grad_delta = summed_product(g, h, delta.dtype) if ctx.needs_input_grad[1] else None
        return g * delta.to(g.dtype) if ctx.needs_input_grad[0] else None, grad_delta


def turned(skew: Tensor) -> Tensor:
    """`R - I` for the rotation `R = (I - K)(I + K)⁻¹`, `K = (P - Pᵀ)/2` (Cayley), of `P (..., r, r)`; in at least float32.

    R - I is `-2 (I + K)⁻¹ K`: exactly zero at P = 0, and nothing cancels near it.
    """
    with torch.autocast(skew.device.type, enabled=False):
        k = (wide(skew) - wide(skew).mT) / 2
        identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        turn: Tensor = torch.linalg.solve_ex(identity + k, -2 * k).result
        return turn
