"""A product with a frozen matrix that autograd keeps nothing of: the ground that storages and frozen factors share.

A saved view of a gathered weight would keep every layer's bytes alive from forward to backward (docs/design.md, "Traps of
ZeRO-3"). So the autograd node keeps the *module*, and the module reads its parameters again when the gradient arrives; by then
a sharding engine has gathered them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_subspace.torch_internals import TensorFunction, cpu_multiplies, reshaped
from dist_subspace.torch_internals import grouped_mm as grouped_mm
from dist_subspace.torch_internals import has_grouped_kernel as has_grouped_kernel


@dataclass(frozen=True)
class RowPiece:
    """Some rows of a matrix.

    rows: `(k, in)`; runs: of rows that follow one another in the matrix, (place of the first in `rows`, its number in the
    matrix, how many). Rows outside the runs are none of the matrix's.
    """

    rows: Tensor
    runs: tuple[tuple[int, int, int], ...]


# Gives every row of a matrix once, a piece at a time; collective where the pieces come from several ranks.
RowSource = Callable[[], Iterator[RowPiece]]


class LinearMap(Protocol):
    """What a module provides: both products on rows, without autograd."""

    def product(self, x: Tensor) -> Tensor:
        """`x M^T` for `x (tokens, in)`."""

    def transposed_product(self, g: Tensor) -> Tensor:
        """`g M` for `g (tokens, out)`."""


def product_type(x: Tensor) -> torch.dtype:
    """The type that products with x run in: its own, or float32 for 16 bits on a CPU that has no products of that type, where
    the sums are the same ones (they add up in float32 anyway) and up to fifty times faster."""
    return x.dtype if x.device.type != "cpu" or cpu_multiplies(x.dtype) else torch.float32


def through(linear_map: LinearMap, x: Tensor) -> Tensor:
    """`x M^T` for `x (..., in)`, differentiable in x; saves no tensor."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Product.apply(x, linear_map)
    return on_rows(linear_map.product, x)


def on_rows(product: Any, x: Tensor) -> Tensor:
    """Run a two-dimensional product on `(..., features)`."""
    y = product(x.reshape(-1, x.shape[-1]))
    return reshaped(y, (*x.shape[:-1], y.shape[-1]))


class _Product(TensorFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear_map: LinearMap) -> Tensor:
        ctx.linear_map = linear_map
        return on_rows(linear_map.product, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return on_rows(ctx.linear_map.transposed_product, g), None


class Gate(Protocol):
    """What a frozen matrix M is changed by entry by entry: `M + M ⊙ Δ`. Δ is asked for a few rows at a time, and never whole.

    factors: the tensors that Δ is a function of; their gradients are Δ's.
    """

    factors: tuple[Tensor, ...]

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """`Δ[rows]`, `(rows, in)`, without autograd."""

    def gradients(self, tiles: Iterable[tuple[slice, Tensor]]) -> tuple[Tensor, ...]:
        """The factors' gradients from `(rows, ∂Δ[rows])`, which come in order and hold every row once."""


class GatedMap(Protocol):
    """What a module provides that can be changed so: both passes on rows, without autograd."""

    def gated_product(self, x: Tensor, branch: Tensor, gate: Gate) -> Tensor:
        """`x Mᵀ + branch (M ⊙ Δ)ᵀ` for `x, branch (tokens, in)`."""

    def gated_gradients(
        self, g: Tensor, branch: Tensor, gate: Gate, apart: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """For `g (tokens, out)`: the gradients of x and of the branch where they are `apart`, else of the one input of both
        (and None); and of the gate's factors."""


def through_gate(linear_map: GatedMap, x: Tensor, gate: Gate, branch: Tensor | None = None) -> Tensor:
    """`x Mᵀ + branch (M ⊙ Δ)ᵀ` for `x, branch (..., in)`; the branch is x where none is given. Saves the branch and the gate's
    factors, and nothing of M or Δ."""
    return _Gated.apply(x, branch, linear_map, gate, *gate.factors)


class _Gated(TensorFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, linear_map: GatedMap, gate: Gate, *factors: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows if branch is None else branch.reshape(rows.shape)
        ctx.save_for_backward(inner, *factors)
        ctx.linear_map, ctx.gate, ctx.shape, ctx.apart = linear_map, gate, x.shape, branch is not None
        y = linear_map.gated_product(rows, inner, gate)
        return reshaped(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        inner, *_ = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        grad_x, grad_branch, grads = ctx.linear_map.gated_gradients(flat, inner, ctx.gate, ctx.apart)
        return grad_x.view(ctx.shape), None if grad_branch is None else grad_branch.view(ctx.shape), None, None, *grads
