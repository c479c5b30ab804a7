"""The storages by name. A new one is a file of this folder that registers a function from a matrix to a `FrozenLinear`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.options import Option
from dist_subspace.storage.operator import FrozenLinear, Origin
from dist_subspace.storage.pieces import PieceWise

SECTION = "model.storage_options"
Adopt = Callable[[nn.Module], FrozenLinear]


# pack(weight, *, transposed, bias, origin, **options): hold `weight` `(d_out, d_in)`, `(d_in, d_out)` where `transposed`.
Pack = Callable[..., FrozenLinear]
# bytes_held(d_out, d_in, **options): what such a matrix takes, statistics included, bias apart.
BytesHeld = Callable[..., int]
# in_pieces((d_out, d_in), transposed, **options): how such a matrix is packed piece by piece.
InPieces = Callable[..., PieceWise]


@dataclass(frozen=True)
class StorageInfo:
    """What a storage says of itself.

    name: what `storage=` takes; bits: of one weight, statistics apart; dtype: of a float storage, else None; help: one line;
    options: what `model.storage_options` takes; bytes_held: what a matrix takes; in_pieces: how it is packed piece by piece, None
    where it is packed whole only.
    """

    name: str
    bits: int
    pack: Pack
    bytes_held: BytesHeld
    help: str
    dtype: torch.dtype | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    in_pieces: InPieces | None = None

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Every option of the storage with its value, those that are not given at their defaults.

        Raises:
            UsageError: an option that the storage does not have, or a value that it does not accept.
        """
        for name, value in options.items():
            if name not in self.options:
                accepted = ", ".join(self.options) or "none"
                raise UsageError(f"{SECTION}.{name} is no option of storage {self.name!r}; accepted: {accepted}")
            self.options[name].check(name, value, SECTION)
        return {name: option.default for name, option in self.options.items()} | dict(options)


@dataclass(frozen=True)
class ForeignLayer:
    """A kind of layer that another library made and that a storage holds byte for byte: how it is told, and taken over."""

    recognises: Callable[[nn.Module], bool]
    adopt: Adopt


_STORAGES: dict[str, StorageInfo] = {}
_FOREIGN: list[ForeignLayer] = []


def register(
    name: str,
    *,
    bits: int,
    bytes_held: BytesHeld,
    help: str,
    dtype: torch.dtype | None = None,
    options: Mapping[str, Option] | None = None,
    in_pieces: InPieces | None = None,
) -> Callable[[Pack], Pack]:
    """Decorator of a storage's `Pack`."""

    def add(pack: Pack) -> Pack:
        _STORAGES[name] = StorageInfo(name, bits, pack, bytes_held, help, dtype, options or {}, in_pieces)
        return pack

    return add


def adopts(recognises: Callable[[nn.Module], bool]) -> Callable[[Adopt], Adopt]:
    """Decorator of a function that takes over the layers that `recognises` tells."""

    def add(adopt: Adopt) -> Adopt:
        _FOREIGN.append(ForeignLayer(recognises, adopt))
        return adopt

    return add


def storages() -> dict[str, StorageInfo]:
    """Every registered storage by name."""
    return {name: _STORAGES[name] for name in sorted(_STORAGES)}


def foreign_layers() -> list[ForeignLayer]:
    """The kinds of layers of other libraries that some storage takes over."""
    return list(_FOREIGN)


def storage_info(name: str) -> StorageInfo:
    known = storages()
    if name not in known:
        raise unknown_name("model.storage", name, known)
    return known[name]


def options_for(storage: str, double_quant: bool, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A storage's options, checked. `double_quant` is the older name of an option that some have; for others it means nothing.

    Raises:
        UsageError: as `StorageInfo.checked`.
    """
    info = storage_info(storage)
    older = {"double_quant": double_quant} if "double_quant" in info.options else {}
    return info.checked(older | dict(options or {}))


def pack(
    weight: Tensor,
    storage: str,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    origin: Origin | None = None,
    double_quant: bool = False,
    **options: Any,
) -> FrozenLinear:
    """Hold a matrix frozen in the named storage.

    Arguments:
        weight: `(d_out, d_in)`, or `(d_in, d_out)` where `transposed` (GPT-2's Conv1D); float32, bfloat16 or float16.
        double_quant: as `options_for`; options: the storage's own others.

    Raises:
        UsageError: for a storage that is not registered, or an option that it does not take.
    """
    storage_options = options_for(storage, double_quant, options)
    operator = storage_info(storage).pack(weight, transposed=transposed, bias=bias, origin=origin, **storage_options)
    operator.conv1d = transposed
    return operator


def discover(folder: Iterable[str]) -> None:
    """Import every file of the package: those that hold storages register them."""
    for module in pkgutil.iter_modules(folder, "dist_subspace.storage."):
        importlib.import_module(module.name)
