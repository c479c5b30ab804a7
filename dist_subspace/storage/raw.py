"""Numbers as bytes: packed weights and their statistics are kept as int8 parameters.

An engine that casts every floating parameter to its own type (a bf16 DeepSpeed engine at stages 0 to 2 does) leaves bytes
alone, and bytes of one type travel in one collective. The type is int8 and not uint8 because transformers' T5 casts its
activations to the type of `wo.weight`, unless that is int8.
"""

from __future__ import annotations

from functools import lru_cache

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


def float8_numbers(codes: Tensor) -> Tensor:
    """float32 of float8 codes. On a CPU torch converts them one by one; a table of all 256 is several times as fast."""
    if codes.device.type != "cpu":
        return codes.float()
    places = codes.reshape(-1).view(torch.uint8).int()
    return torch.index_select(_all_float8(codes.dtype), 0, places).view(codes.shape)


@lru_cache(maxsize=4)
def _all_float8(kind: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(kind).float()
