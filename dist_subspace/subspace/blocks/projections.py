"""Random projections that all layers share, frozen and split over the ranks like a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.subspace.blocks.dropout import Dropout
from dist_subspace.torch_internals import TensorFunction, reshaped


class Projections(nn.Module):
    """`z + l ⊙ (B (d ⊙ (A D(x))))` for one frozen `A (r, max d_in)` and `B (max d_out, r)`, cut to the widths of x and z.

    Called as a module, so that a sharding engine gathers A and B; backward reads them again instead of keeping them.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)
        self._claimed = False

    def claim(self) -> bool:
        """True for the first layer that asks: that one answers for the projections in files."""
        first, self._claimed = not self._claimed, True
        return first

    def forward(self, z: Tensor, x: Tensor, d: Tensor, l: Tensor, dropout: float) -> Tensor:  # noqa: E741
        return _Between.apply(z, x, d, l, self, dropout)

    def slices(self, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`A (r, in_features)` and `B (out_features, r)`."""
        return self.a[:, :in_features].to(dtype), self.b[:out_features].to(dtype)


class _Between(TensorFunction):
    """Saves `A D(x)`, d and l: not x, and nothing of A and B. `∂l_i = B_i · (Σ_tokens g_i h)` costs r products a token, so
    that the branch's output need not be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        x: Tensor,
        d: Tensor,
        l: Tensor,  # noqa: E741
        projections: Projections,
        dropout: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = projections.slices(x.shape[-1], z.shape[-1], x.dtype)
        ctx.drop, ctx.projections, ctx.shape = Dropout(dropout, rows), projections, x.shape
        down = a @ ctx.drop(rows).t()
        ctx.save_for_backward(down, d, l)
        hidden = d.to(x.dtype)[:, None] * down
        left = l.to(x.dtype)[:, None] * b
        return reshaped(torch.addmm(z.reshape(-1, z.shape[-1]), hidden.t(), left.t()), z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        down, d, l = ctx.saved_tensors  # noqa: E741
        a, b = ctx.projections.slices(ctx.shape[-1], g.shape[-1], g.dtype)
        flat, near = g.reshape(-1, g.shape[-1]), d.to(g.dtype)[:, None]
        grad_hidden = (l.to(g.dtype)[:, None] * b).t() @ flat.t()
        grad_d = (grad_hidden * down).sum(1, dtype=torch.float32).to(d.dtype)
        grad_l = ((near * down @ flat).t() * b).sum(1, dtype=torch.float32).to(l.dtype)
        grad_x = ctx.drop((near * grad_hidden).t() @ a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return g, grad_x, grad_d, grad_l, None, None
