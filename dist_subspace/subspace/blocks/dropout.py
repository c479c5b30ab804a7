"""Dropout whose mask is a function of a seed, drawn again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_subspace.torch_internals import TensorFunction


class Dropout:
    """Inverted dropout with probability `p` on tensors shaped like `x`.

    The seed comes from PyTorch's CPU generator, which the training loop seeds by (seed, micro-batch) and which activation
    checkpointing restores for its recomputation: the same mask in both draws, on every number of ranks, at no memory.
    """

    def __init__(self, p: float, x: Tensor) -> None:
        self.p = p
        if p > 0:
            self.seed = int(torch.randint(2**62, ()).item())
            self.shape, self.device = x.shape, x.device

    def __call__(self, x: Tensor) -> Tensor:
        return self.again()(x)

    def again(self) -> Callable[[Tensor], Tensor]:
        """The same dropout with its mask drawn once, for several tensors in one backward."""
        if self.p == 0:
            return _identity
        generator = torch.Generator(self.device).manual_seed(self.seed)
        keep = torch.rand(self.shape, device=self.device, generator=generator) >= self.p
        return lambda x: x * keep.to(x.dtype).div_(1 - self.p)


def _identity(x: Tensor) -> Tensor:
    return x


class _Drop(TensorFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.drop = Dropout(p, x)
        dropped: Tensor = ctx.drop(x)
        return dropped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.drop(g), None


def drop(x: Tensor, p: float) -> Tensor:
    """The same dropout as an operation of its own; keeps nothing but the seed for backward."""
    if p == 0:
        return x
    return _Drop.apply(x, p)
