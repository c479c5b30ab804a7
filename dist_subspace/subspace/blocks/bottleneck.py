"""Bottlenecks in series with a frozen module, the building block of the Houlsby and Pfeiffer adapters (docs/methods.md,
"Bottlenecks")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.linear_map import product_type
from dist_subspace.subspace.blocks.low_rank import ACTIVATIONS, kaiming_uniform
from dist_subspace.subspace.core.linear import SubspaceLinear
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.spec import Settings


def make_bottleneck(part: SubspacePart, width: int, settings: Settings, generator: torch.Generator) -> None:
    """Give the part `W_dn (c, d)` Kaiming-uniform with a = √5, `W_up (d, c)` zero, and zero biases: `Ad(h) = 0` exactly."""
    part.adapter_down = nn.Parameter(kaiming_uniform(settings.rank, width, generator))
    part.adapter_down_bias = nn.Parameter(torch.zeros(settings.rank))
    part.adapter_up = nn.Parameter(torch.zeros(width, settings.rank))
    part.adapter_up_bias = nn.Parameter(torch.zeros(width))


def bottleneck(part: Any, h: Tensor) -> Tensor:
    """`Ad(h) = W_up σ(W_dn h + b_dn) + b_up` for `h (..., d)`, in h's type."""
    wide = product_type(h)
    down, down_bias, up, up_bias = (
        p.to(wide) for p in (part.adapter_down, part.adapter_down_bias, part.adapter_up, part.adapter_up_bias)
    )
    hidden = ACTIVATIONS[part.settings.options["activation"]](functional.linear(h.to(wide), down, down_bias))
    return functional.linear(hidden, up, up_bias).to(h.dtype)


class BottleneckLinear(SubspaceLinear):
    """`z + Ad(z)` for the output `z = W x + b` of a frozen layer."""

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        make_bottleneck(self, self.out_features, settings, generator)

    def transform(self, x: Tensor) -> Tensor:
        return self.base(x)

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z + bottleneck(self, z) if self.enabled else z


class BottleneckNorm(SubspacePart):
    """`norm(u + Ad(norm(u)))` for the frozen norm of a post-norm block, whose input u is the sum with the residual."""

    def __init__(self, norm: nn.Module, settings: Settings, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = norm
        self.settings = settings
        self.enabled = True
        make_bottleneck(self, width, settings, generator)

    def forward(self, u: Tensor) -> Tensor:
        y: Tensor = self.base(u)
        return self.base(u + bottleneck(self, y)) if self.enabled else y

    def extra_repr(self) -> str:
        return f"method={self.info.name}, rank={self.settings.rank}"
