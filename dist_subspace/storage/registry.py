"""The storages by name. A new one is a file that registers a function from a matrix to a `FrozenLinear`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_subspace.errors import unknown_name
from dist_subspace.storage.operator import FrozenLinear, Origin


class Pack(Protocol):
    """Hold `weight` frozen. It is `(d_out, d_in)`, or `(d_in, d_out)` where `transposed`."""

    def __call__(
        self, weight: Tensor, *, transposed: bool, bias: Tensor | None, origin: Origin | None, double_quant: bool
    ) -> FrozenLinear: ...


@dataclass(frozen=True)
class StorageInfo:
    """name: what `storage=` takes; bits: of one weight, statistics apart; dtype: of a float storage, else None."""

    name: str
    bits: int
    dtype: torch.dtype | None
    pack: Pack


_STORAGES: dict[str, StorageInfo] = {}


def register(name: str, *, bits: int, dtype: torch.dtype | None = None) -> Callable[[Pack], Pack]:
    def add(pack: Pack) -> Pack:
        _STORAGES[name] = StorageInfo(name, bits, dtype, pack)
        return pack

    return add


def storages() -> dict[str, StorageInfo]:
    """Every registered storage by name."""
    return dict(_STORAGES)


def storage_info(name: str) -> StorageInfo:
    if name not in _STORAGES:
        raise unknown_name("storage", name, _STORAGES)
    return _STORAGES[name]


def pack(
    weight: Tensor,
    storage: str,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    origin: Origin | None = None,
    double_quant: bool = False,
) -> FrozenLinear:
    """Hold a matrix frozen in the named storage.

    Arguments:
        weight: `(d_out, d_in)`, or `(d_in, d_out)` where `transposed` (GPT-2's Conv1D); float32, bfloat16 or float16.
        double_quant: quantise the 4-bit storages' absmax again; other storages ignore it.

    Raises:
        UsageError: for a storage that is not registered.
    """
    operator = storage_info(storage).pack(
        weight, transposed=transposed, bias=bias, origin=origin, double_quant=double_quant
    )
    operator.conv1d = transposed
    return operator
