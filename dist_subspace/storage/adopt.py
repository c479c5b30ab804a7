"""Layers that others made, taken over as frozen operators by the storage that holds them in the same bytes.

Adoption copies no weight. A floating parameter stays the same object (it may be tied to another module, or already
partitioned by ZeRO-3); a quantised layer's bytes and statistics become parameters of the operator.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dist_subspace.module_places import move_hooks
from dist_subspace.storage.dense import adopt_plain
from dist_subspace.storage.linear_layers import is_conv1d, is_linear
from dist_subspace.storage.operator import FrozenLinear
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.reads import read_layers
from dist_subspace.storage.registry import Adopt, foreign_layers


def adopt(module: nn.Module) -> FrozenLinear | None:
    """The module as a frozen operator, or None if it is no linear layer that is known here."""
    if isinstance(module, FrozenLinear):
        return module
    taken = adopter(module)
    return None if taken is None else taken(module)


def adopter(module: nn.Module) -> Adopt | None:
    """What makes an operator of the module. A storage knows its own layers better than `nn.Linear`, whose subclasses they are."""
    adopt = next((kind.adopt for kind in foreign_layers() if kind.recognises(module)), None)
    return adopt or (adopt_plain if is_linear(module) else None)


def adopt_all(model: nn.Module, *, except_for: Iterable[str] = ()) -> list[str]:
    """Replace every linear layer of the model in place; returns the names replaced. Shared modules stay shared, and layers
    that cannot be operators (`left_alone`) stay what they are."""
    skipped = {*except_for, *left_alone(model)}
    made: dict[int, FrozenLinear] = {}
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name in skipped or not name or isinstance(module, FrozenLinear):
            continue
        operator = made.get(id(module)) or adopt(module)
        if operator is None:
            continue
        if id(module) not in made and operator is not module:
            move_hooks(module, operator)
        made[id(module)] = operator
        if isinstance(operator, PackedLinear):
            operator.name, operator.compute_dtype = name, getattr(model, "dtype", torch.float32)
        operator.train(module.training)
        replace(model, name, operator)
        names.append(name)
    return names


def left_alone(model: nn.Module) -> dict[str, str]:
    """The model's linear layers that can be no operators, by every name that they have, and why; alike on every rank."""
    linear = {m: n for n, m in model.named_modules() if n and (isinstance(m, nn.Linear) or is_conv1d(m))}
    read = {model.get_submodule(name): where for name, where in read_layers(model, linear).items()}
    reasons = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in read:
            reasons[name] = f"{read[module]} reads its weight, and does not only call it"
        elif module in linear and adopter(module) is None:
            reasons[name] = f"its class, {type(module).__name__}, computes something else than a product and a bias"
            if type(module) is nn.Linear:  # weight normalisation, pruning, another forward
                reasons[name] = "its weight is made anew at every call, or its forward is another than nn.Linear's"
    return reasons


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name` (dotted)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
