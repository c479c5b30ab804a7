"""Packing a matrix piece by piece: what a storage says of itself, so that who keeps a part of a matrix packs that part alone.

The matrix is seen flat and cut into units: entries that are packed together, because they share a statistic (a block of 64, a
row). Every unit gives the same number of entries of each tensor, in order, so that the units of any part of any tensor are
known before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dist_subspace.storage.operator import FrozenLinear, Origin


@dataclass(frozen=True)
class FlatTensor:
    """One tensor of an operator: shape and type of the whole, and how many of its entries a unit of the matrix gives (the last
    unit may give fewer; 0 for a tensor that is made of statistics)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_unit: int = 0

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class PieceWise:
    """How one matrix is packed piece by piece.

    shape: `(d_out, d_in)`.
    unit: entries of the flat matrix that are packed together. A piece begins at a multiple of it, and ends at one or at the end.
    as_given: whether the flat matrix has the checkpoint's layout; else it is `(d_out, d_in)` row by row, whatever the file has.
    tensors: what `pack` gives, by the operator's names.
    statistic: what `pack` gives beside them, under `STATISTIC`, if it takes the whole of it to go on.
    late: what `late_tensors` makes of the whole statistic.
    """

    STATISTIC: ClassVar[str] = ""  # no parameter has this name

    shape: tuple[int, int]
    unit: int
    as_given: bool = False
    tensors: Mapping[str, FlatTensor]
    statistic: FlatTensor | None = None
    late: Mapping[str, FlatTensor]

    @property
    def units(self) -> int:
        """How many the matrix has."""
        return -(-self.shape[0] * self.shape[1] // self.unit)

    def pack(self, piece: Tensor) -> dict[str, Tensor]:
        """The entries of every tensor, flat, for a flat piece of the matrix in float32, bfloat16 or float16."""
        raise NotImplementedError

    def plain_values(self, statistic: Tensor) -> dict[str, float]:
        """The operator's plain values, from the whole statistic."""
        return {}

    def late_tensors(self, statistic: Tensor, values: Mapping[str, float]) -> dict[str, Tensor]:
        """The tensors of `late`, flat and whole."""
        return {}

    def operator(
        self, tensors: Mapping[str, nn.Parameter], *, bias: Tensor | None, origin: Origin | None
    ) -> FrozenLinear:
        """The operator around parameters that are split already, whose own shapes say nothing."""
        raise NotImplementedError
