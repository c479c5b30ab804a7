"""A low-rank pair that starts at a frozen pair and is measured from there: `y = z + (B w A - B0 w A0) x`.

Two branches as large as `W x` that cancel would leave nothing but their rounding errors in 16 bits. So with `A = A0 + δA` and
`B = B0 + δB` the difference is computed as `δB w A x + B0 w δA x`: exactly zero at the start in every type, small where it is
small. It costs LoRA's products with 2r rows. The frozen pair lies on the part itself, and backward reads it again from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_subspace.subspace.blocks.dropout import Dropout
from dist_subspace.torch_internals import TensorFunction, reshaped

# A0 (r, d_in), B0 (d_out, r), and the weights w of the r terms: one number, or (r,).
FrozenPair = tuple[Tensor, Tensor, Tensor | float]


class Pinned(Protocol):
    """What a part provides: its frozen pair, from its parameters as they are now."""

    def frozen_pair(self) -> FrozenPair: ...


class DeviationUpdate(TensorFunction):
    """`y = z + (B w A - B0 w A0) D(x)` for `x (..., d_in)`, `z (..., d_out)`, saving x once and no frozen tensor.

    The trained `a (r, d_in)` and `b (d_out, r)` are A and B themselves where `absolute`, else the deviations δA and δB.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, x: Tensor, a: Tensor, b: Tensor, part: Pinned, absolute: bool, dropout: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        drop = Dropout(dropout, rows)
        left, right, _ = _sides(a, b, part, absolute, x.dtype)
        hidden = right @ drop(rows).t()
        ctx.save_for_backward(rows, a, b, hidden)
        ctx.part, ctx.absolute, ctx.drop, ctx.shape = part, absolute, drop, x.shape
        return reshaped(torch.addmm(z.reshape(-1, z.shape[-1]), hidden.t(), left.t()), z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, hidden = ctx.saved_tensors
        rank, drop = a.shape[0], ctx.drop.again()
        left, right, weights = _sides(a, b, ctx.part, ctx.absolute, g.dtype)
        flat = g.reshape(-1, g.shape[-1])
        grad_hidden = left.t() @ flat.t()
        # Bᵀ g = δBᵀ g + B0ᵀ g, and A D(x) is the upper half of what forward kept.
        grad_a = (grad_hidden[:rank] + grad_hidden[rank:]) @ drop(rows)
        grad_b = (hidden[:rank] @ flat).t().to(b.dtype)
        grad_x = drop(grad_hidden.t() @ right).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return g, grad_x, weighted(grad_a.to(a.dtype), weights), grad_b, None, None, None


class PinnedUpdate(TensorFunction):
    """`y = z + c B0 w A0 x`, nothing trained; `pair` reads A0, B0 and w as they are now."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, pair: Callable[[], FrozenPair], factor: float) -> Tensor:
        a, b, weights = pair()
        ctx.pair, ctx.factor, ctx.shape = pair, factor, x.shape
        hidden = weighted(a, weights).to(x.dtype) @ x.reshape(-1, x.shape[-1]).t()
        flat = z.reshape(-1, z.shape[-1])
        return reshaped(torch.addmm(flat, hidden.t(), b.to(x.dtype).t(), alpha=factor), z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return g, None, None, None
        a, b, weights = ctx.pair()
        grad_hidden = b.to(g.dtype).t() @ g.reshape(-1, g.shape[-1]).t()
        grad_x = (grad_hidden.t() @ weighted(a, weights).to(g.dtype)).mul_(ctx.factor).view(ctx.shape)
        return g, grad_x, None, None


def weighted(a: Tensor, weights: Tensor | float) -> Tensor:
    """`w A`: each of the r rows times its weight."""
    if isinstance(weights, Tensor):
        return weights[:, None] * a
    return a if weights == 1 else weights * a


def wide(t: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return t if t.dtype == torch.float64 else t.float()


def _sides(
    a: Tensor, b: Tensor, part: Pinned, absolute: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | float]:
    """`[δB | B0] (d_out, 2r)` and `w [A ; δA] (2r, d_in)` in the type of the computation, and w."""
    a0, b0, weights = part.frozen_pair()
    shift_a, shift_b = (a - a0, b - b0) if absolute else (a, b)
    whole = a if absolute else a0 + a
    left = torch.cat([shift_b.to(dtype), b0.to(dtype)], 1)
    right = torch.cat([weighted(whole, weights).to(dtype), weighted(shift_a, weights).to(dtype)])
    return left, right, weights
