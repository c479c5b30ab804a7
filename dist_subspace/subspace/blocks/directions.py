"""A low-rank update beside fixed directions whose strengths are trained, as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_subspace.subspace.blocks.dropout import Dropout
from dist_subspace.torch_internals import TensorFunction, reshaped


class DirectedUpdate(TensorFunction):
    """`y = z + γ B (A D(x)) + U (δ ⊙ (V D(x)))` for `A (r, d_in)`, `B (d_out, r)`, `δ (q,)`, and frozen `U (d_out, q)` and
    `V (q, d_in)`.

    Both branches are one product of `r + q` rows, which costs what a rank of r + q does. Rules as in `LowRankUpdate`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        delta: Tensor,
        u: Tensor,
        v: Tensor,
        scale: float,
        p: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        drop = Dropout(p, rows)
        hidden = _down(a, v, scale, x.dtype) @ drop(rows).t()
        ctx.save_for_backward(rows, a, b, delta, u, v, hidden)
        ctx.scale, ctx.drop, ctx.shape = scale, drop, x.shape
        return reshaped(torch.addmm(z.reshape(-1, z.shape[-1]), hidden.t(), _up(b, delta, u, x.dtype).t()), z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, delta, u, v, hidden = ctx.saved_tensors
        flat, r, drop = g.reshape(-1, g.shape[-1]), a.shape[0], ctx.drop.again()
        grad_up = hidden @ flat
        grad_b = grad_up[:r].t().to(b.dtype)
        grad_delta = (grad_up[r:].t() * u.to(g.dtype)).sum(0, dtype=torch.float32).to(delta.dtype)
        grad_hidden = _up(b, delta, u, g.dtype).t() @ flat.t()
        grad_a = (grad_hidden[:r] @ drop(rows)).to(a.dtype).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = drop(grad_hidden.t() @ _down(a, v, ctx.scale, g.dtype)).view(ctx.shape)
        return g, grad_x, grad_a, grad_b, grad_delta, None, None, None, None


def _down(a: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`[γ A ; V]`."""
    return torch.cat([a * scale, v]).to(dtype)


def _up(b: Tensor, delta: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B | U diag(δ)]`."""
    return torch.cat([b, u * delta], 1).to(dtype)
