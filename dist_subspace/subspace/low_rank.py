"""The low-rank branch as one autograd function: it takes `x` and `z = W(x)`, saves `x` once, and builds no dense matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_subspace.subspace.dropout import Dropout


class LowRankUpdate(torch.autograd.Function):
    """`y = z + γ B (A D(x))` for `x (..., d_in)`, `z (..., d_out)`, `A (r, d_in)`, `B (d_out, r)`.

    The call of the frozen operator stays outside, so that a sharding engine's hooks see it. A and B may be float32 beside
    a 16-bit x: the products run in x's type, their gradients come back in the parameter's own.
    """

    # γ multiplies A, the smallest factor there is, and every product is taken with the r side first: `(r, tokens)` costs
    # half of `(tokens, r)` on CPUs. z is not added to in place: whoever made it, or hooks its module, may still hold it.

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        drop = Dropout(dropout, rows)
        hidden = _scaled(a, scale, x.dtype) @ drop(rows).t()
        ctx.save_for_backward(rows, a, b, hidden)
        ctx.scale, ctx.drop, ctx.shape = scale, drop, x.shape
        flat = z.reshape(-1, z.shape[-1])
        return torch.addmm(flat, hidden.t(), b.to(x.dtype).t()).view(z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, hidden = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, _, _ = ctx.needs_input_grad
        flat = g.reshape(-1, g.shape[-1])
        grad_b = (hidden @ flat).t().to(b.dtype) if needs_b else None
        if not (needs_x or needs_a):
            return g, None, None, grad_b, None, None
        drop = ctx.drop.again()
        grad_hidden = b.to(g.dtype).t() @ flat.t()
        grad_a = (grad_hidden @ drop(rows)).to(a.dtype).mul_(ctx.scale) if needs_a else None
        grad_x = drop(grad_hidden.t() @ _scaled(a, ctx.scale, g.dtype)).view(ctx.shape) if needs_x else None
        return g, grad_x, grad_a, grad_b, None, None


def _scaled(a: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`γ A` in the type of the computation; the product is rounded once."""
    return (a * scale).to(dtype)
