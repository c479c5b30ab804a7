"""Frozen matrices that a method brings along: spectral bases, initial factors, projections. Linear operators themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.linear_map import through


class FrozenFactor(nn.Module):
    """`y = x Mᵀ` for a frozen `M (out, in)`, held in the type of the computation and split over the ranks like a weight.

    Called as a module, once a forward, so that a sharding engine gathers it; backward reads it again instead of keeping it.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.detach().to(dtype or matrix.dtype).contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return through(self, x)

    def product(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x.dtype).t()

    def transposed_product(self, g: Tensor) -> Tensor:
        return g @ self.matrix.to(g.dtype)
