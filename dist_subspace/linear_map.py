"""A product with a frozen matrix that autograd keeps nothing of: the ground that storages and frozen factors share.

A saved view of a gathered weight would keep every layer's bytes alive from forward to backward (design.md 6). So the autograd
node keeps the *module*, and the module reads its parameters again when the gradient arrives; by then a sharding engine has
gathered them anew.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class LinearMap(Protocol):
    """What a module provides: both products on rows, without autograd."""

    def product(self, x: Tensor) -> Tensor:
        """`x M^T` for `x (tokens, in)`."""

    def transposed_product(self, g: Tensor) -> Tensor:
        """`g M` for `g (tokens, out)`."""


def through(linear_map: LinearMap, x: Tensor) -> Tensor:
    """`x M^T` for `x (..., in)`, differentiable in x; saves no tensor."""
    if x.requires_grad and torch.is_grad_enabled():
        product: Tensor = _Product.apply(x, linear_map)
        return product
    return on_rows(linear_map.product, x)


def on_rows(product: Any, x: Tensor) -> Tensor:
    """Run a two-dimensional product on `(..., features)`."""
    y = product(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], y.shape[-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear_map: LinearMap) -> Tensor:
        ctx.linear_map = linear_map
        return on_rows(linear_map.product, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return on_rows(ctx.linear_map.transposed_product, g), None
