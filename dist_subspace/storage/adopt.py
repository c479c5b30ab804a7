"""Layers that others made, taken over as frozen operators: `nn.Linear`, GPT-2's `Conv1D`, bitsandbytes' 4 and 8 bit layers.

Adoption copies no weight. A floating parameter stays the same object (it may be tied to another module, or already
partitioned by ZeRO-3); a quantised layer's bytes and statistics become parameters of the operator.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dist_subspace.module_places import move_hooks
from dist_subspace.storage import bnb
from dist_subspace.storage.dense import DenseLinear
from dist_subspace.storage.four_bit import FourBitLinear
from dist_subspace.storage.int8 import Int8Linear
from dist_subspace.storage.operator import FrozenLinear
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.reads import read_layers


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
        elif module in linear and not (bnb.is_4bit(module) or bnb.is_8bit(module) or is_linear(module)):
            reasons[name] = f"its class, {type(module).__name__}, computes something else than a product and a bias"
            if type(module) is nn.Linear:  # weight normalisation, pruning, another forward
                reasons[name] = "its weight is made anew at every call, or its forward is another than nn.Linear's"
    return reasons


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name` (dotted)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_linear(module: nn.Module) -> bool:
    """An `nn.Linear`, a subclass of it that computes the same, or a `Conv1D`; nothing whose weight is made by a hook (weight
    normalisation, pruning), or whose forward was set on the instance."""
    if type(module) is nn.Linear or is_conv1d(module):
        return (
            set(module._parameters) == {"weight", "bias"} and not module._buffers and "forward" not in module.__dict__
        )
    return isinstance(module, nn.Linear) and "forward" not in module.__dict__ and _is_the_same(module)


def _is_the_same(module: nn.Linear) -> bool:
    """Whether a subclass of `nn.Linear` holds the same as that and computes the same: tried on a small one of its class, with the
    module's own settings. Falcon's adds the bias apart; others scale, round or gate."""
    kind = type(module)
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    if kind.__call__ is not nn.Module.__call__ or nn.parameter.is_lazy(module.weight):
        return False
    if kind.forward is nn.Linear.forward:
        return True
    if len(inspect.signature(kind.forward).parameters) != 2:  # a call may say more than the input
        return False
    plain = nn.Linear(6, 5, bias=module.bias is not None, device="cpu", dtype=torch.float32)
    small = kind.__new__(kind)
    nn.Module.__init__(small)
    small.__dict__ |= {key: value for key, value in module.__dict__.items() if key not in small.__dict__}
    small.in_features, small.out_features = 6, 5
    small.weight, small.bias = plain.weight, plain.bias
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in plain.parameters():
            parameter.normal_()
        inputs = [torch.randn(shape, device="cpu") for shape in ((3, 6), (2, 3, 6))]
        try:
            for mode in (True, False):
                if not all(torch.allclose(small.train(mode)(x), plain(x), rtol=1e-5, atol=1e-6) for x in inputs):
                    return False
        except Exception:  # whatever a layer of that class needs that a linear layer does not have
            return False
    return True


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` holds `(in, out)`; it is recognised by name so that storage need not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_shape(module: Any) -> tuple[int, int]:
    """`(d_out, d_in)`, also of a layer whose weight is partitioned (then its own shape is empty)."""
    if is_conv1d(module):
        rows = int(module.nx) if hasattr(module, "nx") else int(module.weight.shape[0])
        return int(module.nf), rows
    return int(module.out_features), int(module.in_features)
