"""Numbers as bytes: packed weights and their statistics are kept as int8 parameters.

An engine that casts every floating parameter to its own type (a bf16 DeepSpeed engine at stages 0 to 2 does) leaves bytes
alone, and bytes of one type travel in one collective. The type is int8 and not uint8 because transformers' T5 casts its
activations to the type of `wo.weight`, unless that is int8.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_bytes(numbers: Tensor) -> Tensor:
    """The same memory as int8 `(bytes,)`."""
    return numbers.contiguous().view(-1).view(torch.int8)


def from_bytes(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 `(bytes,)` read as numbers `(bytes / itemsize,)`; copies only where a gather left it unaligned."""
    if raw.data_ptr() % dtype.itemsize or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)
