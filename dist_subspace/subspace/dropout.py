"""Dropout whose mask is a function of a seed, drawn again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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


def drop(x: Tensor, p: float) -> Tensor:
    """The same dropout under ordinary autograd."""
    return Dropout(p, x)(x)
