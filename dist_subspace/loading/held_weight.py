"""A weight that several tensors of a file hold: codes, and what they mean.

A format says which tensors belong to a weight, and how any run of its entries becomes floats, so that a rank reads and decodes
its own part alone. Where a storage holds the same bytes, the format says which bytes of the file are which of the storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Bytes `[start, stop)` of the values of the tensor with this key, as uint8; good until a key of the same ending is read.
ReadBytes = Callable[[str, int, int], Tensor]
# The same of a tensor of a storage's operator, as int8.
Source = Callable[[ReadBytes, int, int], Tensor]

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def entries(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        """Flat entries `[start, stop)` in the file's type."""
        item = self.dtype.itemsize
        return read(self.key, start * item, stop * item).view(self.dtype)

    def whole(self, read: ReadBytes) -> Tensor:
        """All entries, flat, in memory of their own."""
        return self.entries(read, 0, self.numel).clone()

    def as_bytes(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        """A `Source`: the file's bytes as they are."""
        return read(self.key, start, stop).view(torch.int8)


@dataclass(frozen=True)
class HeldBytes:
    """A tensor of a storage's operator, flat: where its int8 entries are read. It is asked for as a `Layout` is."""

    numel: int
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.numel,)

    @property
    def is_turned(self) -> bool:
        return False


@dataclass(frozen=True)
class AsHeld:
    """How a storage takes a weight's bytes: the options of its `in_pieces`, what each tensor of its operator is read from, and
    the operator's plain values."""

    options: Mapping[str, Any]
    tensors: Mapping[str, Source]
    plain: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HeldWeight:
    """One weight.

    kind: what a person calls the format. parts: the tensors of the file, the codes first. shape: `(..., rows, columns)` in the
    order of the file. turned: whether the model holds the last two sides the other way round. unit: runs of entries that are
    decoded begin at a multiple of it, and end at one or at the end. storage: what holds such bytes as they are, if any does.
    """

    kind: str
    parts: tuple[Stored, ...]
    shape: tuple[int, ...]
    unit: int
    turned: bool = False
    storage: str | None = None

    @property
    def model_shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.shape
        return (*lead, columns, rows) if self.turned else self.shape

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Of all its tensors in the file."""
        return sum(part.nbytes for part in self.parts)

    def values(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        """Flat entries `[start, stop)` in the order of the file, float32."""
        raise NotImplementedError

    def as_held(self, storage: str) -> AsHeld | None:
        """How the storage takes the bytes; None where it would not hold the same numbers."""
        return None

    def rows_as_held(self, storage: str, first: int, rows: int) -> AsHeld | None:
        """The same of some rows of one of its matrices, `first` counted over all matrices."""
        return None
