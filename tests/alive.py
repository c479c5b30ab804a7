"""Which tensors that operations made are alive: what a step keeps between its forward and its backward."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Within the block, every tensor of at least `numel` elements that an operation returns is noted, views too; `alive` are
    those that somebody still holds, be it autograd, a node's own attributes, or a module."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.noted: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel:
                self.noted.append(weakref.ref(tensor))
        return result

    @property
    def alive(self) -> list[tuple[int, ...]]:
        """Their shapes."""
        return [tuple(tensor.shape) for ref in self.noted if (tensor := ref()) is not None]
