"""The heads whose loss can be made from what they are given: a frozen linear layer in any storage, and one trained in full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.linear_map import RowPiece
from dist_subspace.placement.tensors import is_partitioned
from dist_subspace.storage import FrozenLinear, PackedLinear
from dist_subspace.subspace.beside.trained_copy import TrainedCopy, TrainedLinear
from dist_subspace.training.cross_entropy import Head


@dataclass(frozen=True)
class Plain:
    """`x Wᵀ + b` with a matrix `(V, d)` that is whole now; weight and bias: where they are trained."""

    matrix: Tensor
    shift: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def classes(self) -> int:
        return self.matrix.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def logits(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.matrix.detach(), None if self.shift is None else self.shift.detach())

    def backward(self, g: Tensor) -> Tensor:
        return g @ self.matrix.detach()


@dataclass(frozen=True)
class Stored:
    """A frozen operator in some storage, which multiplies in the type of what it is given."""

    layer: FrozenLinear
    dtype: torch.dtype
    weight: None = None
    bias: None = None

    @property
    def classes(self) -> int:
        return self.layer.out_features

    def logits(self, x: Tensor) -> Tensor:
        y = self.layer.product(x)
        return y if self.layer.bias is None else y.add_(self.layer.bias.detach().to(y.dtype))

    def backward(self, g: Tensor) -> Tensor:
        return self.layer.transposed_product(g)


@dataclass(frozen=True)
class InPieces:
    """A frozen operator that is whole nowhere, or whose matrix would be, decoded: its rows come a few at a time."""

    layer: FrozenLinear
    dtype: torch.dtype

    @property
    def classes(self) -> int:
        return self.layer.out_features

    def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
        return self.layer.row_pieces(dtype)

    def whole_bias(self) -> Tensor | None:
        return self.layer.whole_bias()

    def logits(self, x: Tensor) -> Tensor:
        """As a `Head` has them; collective where the rows come from several ranks."""
        y, bias = self.layer.product(x), self.whole_bias()
        return y if bias is None else y.add_(bias.detach().to(y.dtype))


def head_of(module: nn.Module | None, dtype: torch.dtype) -> Head | InPieces | None:
    """The head that the module is, for rows of type `dtype`; None where a loss cannot be made inside it. Local: called while the
    module runs, when what it holds is whole, or known to come in pieces.

    A head with a method on it is none: its layers are calls of modules, which a sharding engine counts.
    """
    if isinstance(module, TrainedCopy):
        return _trained(module)
    if isinstance(module, PackedLinear) or (isinstance(module, FrozenLinear) and module.is_in_pieces):
        return InPieces(module, dtype)
    if isinstance(module, FrozenLinear):
        return Stored(module, dtype)
    if type(module) is nn.Linear and module.weight.dtype == dtype:
        return _plain(module.weight, module.bias)
    return None


def _trained(copy: TrainedCopy) -> Head | None:
    layer = copy.trained
    if not copy.enabled or not isinstance(layer, nn.Linear | TrainedLinear):
        return None
    return _plain(layer.weight, layer.bias)


def _plain(weight: Tensor, bias: Tensor | None) -> Head | None:
    """A trained weight that is split is whole in its layer's own calls alone, forward and backward: those it keeps."""
    held = [p for p in (weight, bias) if p is not None]
    if any(p.requires_grad and is_partitioned(p) for p in held):
        return None
    trained = (p if p is not None and p.requires_grad else None for p in (weight, bias))
    return Plain(weight, bias, *trained)
