"""Layers that others made, taken over as frozen operators: `nn.Linear`, GPT-2's `Conv1D`, bitsandbytes' 4 and 8 bit layers.

Adoption copies no weight. A floating parameter stays the same object (it may be tied to another module, or already
partitioned by ZeRO-3); a quantised layer's bytes and statistics become parameters of the operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dist_subspace.storage import bnb
from dist_subspace.storage.dense import DenseLinear
from dist_subspace.storage.four_bit import FourBitLinear
from dist_subspace.storage.int8 import Int8Linear
from dist_subspace.storage.operator import FrozenLinear


def adopt(module: nn.Module) -> FrozenLinear | None:
    """The module as a frozen operator, or None if it is no linear layer that is known here."""
    if isinstance(module, FrozenLinear):
        return module
    bias = getattr(module, "bias", None)
    if bnb.is_4bit(module):
        return FourBitLinear(bnb.read_4bit(module), bias=bias, origin=None)
    if bnb.is_8bit(module):
        return Int8Linear(bnb.read_8bit(module), bias=bias, origin=None)
    if is_linear(module):
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        return DenseLinear(weight, linear_shape(module), transposed=is_conv1d(module), bias=bias, origin=None)
    return None


def adopt_all(model: nn.Module, *, except_for: Iterable[str] = ()) -> list[str]:
    """Replace every linear layer of the model in place; returns the names replaced. Shared modules stay shared."""
    skipped = set(except_for)
    made: dict[int, FrozenLinear] = {}
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name in skipped or not name or isinstance(module, FrozenLinear):
            continue
        operator = made.get(id(module)) or adopt(module)
        if operator is None:
            continue
        made[id(module)] = operator
        operator.train(module.training)
        replace(model, name, operator)
        names.append(name)
    return names


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name` (dotted)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_linear(module: nn.Module) -> bool:
    """An exact `nn.Linear` or `Conv1D`: a subclass may compute something else."""
    return type(module) is nn.Linear or type(module).__name__ == "NonDynamicallyQuantizableLinear" or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` holds `(in, out)`; it is recognised by name so that storage need not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_shape(module: Any) -> tuple[int, int]:
    """`(d_out, d_in)`, also of a layer whose weight is partitioned (then its own shape is empty)."""
    if is_conv1d(module):
        rows = int(module.nx) if hasattr(module, "nx") else int(module.weight.shape[0])
        return int(module.nf), rows
    return int(module.out_features), int(module.in_features)
