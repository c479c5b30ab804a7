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

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        drop = Dropout(dropout, rows)
        hidden = drop(rows) @ a.to(x.dtype).t()
        ctx.save_for_backward(rows, a, b, hidden)
        ctx.scale, ctx.drop, ctx.shape = scale, drop, x.shape
        flat = z.reshape(-1, z.shape[-1])
        return torch.addmm(flat, hidden, b.to(x.dtype).t(), alpha=scale).view(z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, hidden = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        grad_hidden = flat @ b.to(g.dtype)
        grad_b = (flat.t() @ hidden).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[3] else None
        grad_a = (grad_hidden.t() @ ctx.drop(rows)).to(a.dtype).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = ctx.drop((grad_hidden @ a.to(g.dtype)).mul_(ctx.scale)).view(ctx.shape)
        return g, grad_x, grad_a, grad_b, None, None
