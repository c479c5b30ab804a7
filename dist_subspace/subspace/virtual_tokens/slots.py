"""Where a layer's virtual keys and values wait for the layer's attention, and where their gradients come back."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_subspace.torch_internals import TensorFunction, in_backward


class Switched(Protocol):
    """A part that can be switched off."""

    enabled: bool


class Slot:
    """A layer's virtual keys and values, `(2, heads, n, d_head)` float32, for the attention call to find.

    Within a forward they are `tokens`, a part of autograd's graph. Reentrant checkpointing runs a block without a graph and again
    in backward, where a gradient can only be left on a leaf: `leaf` is a detached copy, whose gradient `CollectGradients` takes.
    """

    def __init__(self, part: Switched, heads: int, head_dim: int) -> None:
        self.part, self.heads, self.head_dim = part, heads, head_dim
        self.tokens: Tensor | None = None
        self.leaf: Tensor | None = None

    def fill(self, tokens: Tensor) -> None:
        """Hold the tokens of the forward that begins."""
        self.tokens = tokens
        if not torch.is_grad_enabled():
            return
        if self.leaf is None or (self.leaf.device, self.leaf.dtype) != (tokens.device, tokens.dtype):
            self.leaf = tokens.detach().clone().requires_grad_(True)
        else:  # the same tensor for every forward: whichever backward comes last finds what all have left
            self.leaf.data.copy_(tokens.detach())

    def current(self) -> Tensor | None:
        """The tokens for a call of the attention, or the leaf for one that a backward repeats."""
        return self.leaf if in_backward() else self.tokens

    def take_gradient(self) -> Tensor | None:
        """What backwards have left on the leaf, which is without a gradient then."""
        if self.leaf is None:
            return None
        gradient, self.leaf.grad = self.leaf.grad, None
        return gradient

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot(copy.deepcopy(self.part, memo), self.heads, self.head_dim)


class CollectGradients(TensorFunction):
    """The input of the first block, unchanged. Its backward comes after that of every block, and gives the tokens the gradients
    that were left in the slots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: list[Slot], *tokens: Tensor) -> Tensor:
        ctx.slots = slots
        return x.clone()  # a view could not be changed in place by the model

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None, *(slot.take_gradient() for slot in ctx.slots)
