"""Low-rank updates whose output rows are rescaled: what DoRA computes on tokens, as autograd functions around one call of the
frozen operator, and the deviation `m / n - 1` of its scale from one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_subspace.subspace.blocks.dropout import Dropout
from dist_subspace.subspace.blocks.sums import summed_product
from dist_subspace.torch_internals import TensorFunction, reshaped

SMALLEST = 1e-12  # of n² over the frozen row's own: where γ B A cancels W, rounding is all that is left of n


class Stack(TensorFunction):
    """The rows that one product with W shall see: `x`, under dropout `D(x)` too, then the rows of A: `(tokens.. + r, d_in)`.

    A's gradient comes back from its rows only where `through_a`: else they are there for `W Aᵀ`, a constant.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, drop: Dropout, through_a: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.drop, ctx.shape, ctx.tokens, ctx.a_type = drop, x.shape, len(rows), a.dtype if through_a else None
        return torch.cat([rows, *([drop(rows)] if drop.p else []), a.to(x.dtype)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        tokens, last = ctx.tokens, 2 * ctx.tokens if ctx.drop.p else ctx.tokens
        grad_x = g[:tokens]
        if ctx.drop.p:
            grad_x = grad_x + ctx.drop(g[tokens:last])
        return grad_x.view(ctx.shape), None if ctx.a_type is None else g[last:].to(ctx.a_type), None, None


class ScaledUpdate(TensorFunction):
    """`y = (1 + δ) ⊙ (W x + γ B A x)` from `out = W Stack(x)`, where δ `(d_out,)` is near zero and float32; under dropout
    `y = W x + δ ⊙ W D(x) + (1 + δ) ⊙ γ B A D(x)`, as the published code has it (docs/methods.md, "dora").

    The gradient of `out` is zero in the rows of A: who differentiates through `W Aᵀ` takes those rows of `out` himself.
    `u = W D(x) + γ B A D(x)` is kept for the gradient of δ: taken back from y it would be 0/0 where the scale is zero.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, delta: Tensor, scale: float, drop: Dropout
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        tokens, shape = len(rows), (*x.shape[:-1], out.shape[-1])
        hidden = (a * scale).to(x.dtype) @ drop(rows).t()
        left, near = b.to(x.dtype).t(), delta.to(x.dtype)
        if drop.p:
            u = torch.addmm(out[tokens : 2 * tokens], hidden.t(), left)
            y = torch.addmm(out[:tokens], hidden.t(), left).addcmul_(u, near)
        else:
            u = torch.addmm(out[:tokens], hidden.t(), left)
            y = torch.addcmul(u, u, near)
        ctx.save_for_backward(rows, a, b, delta, hidden, u)
        ctx.scale, ctx.drop, ctx.out_rows, ctx.shape = scale, drop, len(out), x.shape
        return reshaped(y, shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, delta, hidden, u = ctx.saved_tensors
        tokens, flat, near = len(rows), g.reshape(-1, g.shape[-1]), delta.to(g.dtype)
        grad_out = flat.new_empty(ctx.out_rows, flat.shape[-1])
        if ctx.drop.p:
            grad_out[:tokens] = flat
            torch.mul(flat, near, out=grad_out[tokens : 2 * tokens])
            grad_out[2 * tokens :] = 0
            scaled = torch.addcmul(flat, flat, near)
        else:
            scaled = torch.addcmul(flat, flat, near, out=grad_out[:tokens])
            grad_out[tokens:] = 0
        drop, small = ctx.drop.again(), (a * ctx.scale).to(g.dtype)
        grad_hidden = b.to(g.dtype).t() @ scaled.t()
        grad_x = drop(grad_hidden.t() @ small).view(ctx.shape) if ctx.needs_input_grad[1] else None
        grad_a = (grad_hidden @ drop(rows)).to(a.dtype).mul_(ctx.scale)
        grad_b = (hidden @ scaled).t().to(b.dtype)
        return grad_out, grad_x, grad_a, grad_b, summed_product(flat, u, delta.dtype), None, None


def deviation(
    magnitude: Tensor, norms: Tensor, products: Tensor, a: Tensor, b: Tensor, scale: float, through_norm: bool
) -> Tensor:
    """`m / n - 1` for `m = ‖W_i‖ + magnitude` and `n² = ‖W_i‖² + 2γ B_i (W Aᵀ)_i + γ² B_i A Aᵀ B_iᵀ`, float32 `(d_out,)`.

    Exactly zero where B and magnitude are. A row of zeros is not rescaled. `n` is a constant unless `through_norm`. Numbers a
    row are float64: near n = 0 float32 does not know `SMALLEST - 1` from -1. Autocast would take the products to 16 bits.

    Arguments:
        norms: `‖W_i‖`, float32 `(d_out,)`; products: `W Aᵀ`, `(d_out, r)`; a, b: `(r, d_in)`, `(d_out, r)`.
    """
    empty = norms == 0
    nonzero_norms = torch.where(empty, torch.ones_like(norms), norms).double()
    exact = torch.autocast(norms.device.type, enabled=False)
    with exact, torch.set_grad_enabled(torch.is_grad_enabled() and through_norm):
        a, b = a.float(), b.float()
        inner = torch.addmm(products.float(), b, a @ a.t(), beta=2 * scale, alpha=scale**2)
        added = (b * inner).sum(1).double()
        change = (added / nonzero_norms.square()).clamp(min=SMALLEST - 1)  # n² / ‖W_i‖² - 1
        growth = (1 + change).sqrt()
        excess = change / (1 + growth)  # growth - 1, without the cancellation
    delta = (magnitude.double() / nonzero_norms - excess) / growth
    return torch.where(empty, 0.0, delta).float()
