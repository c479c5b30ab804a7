"""`modules_to_save`: a module that is trained in full beside the subspace (a head, an embedding), and saved with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.subspace.core.operator import Operator
from dist_subspace.subspace.core.trained import Gathered, TrainedBeside


class TrainedCopy(TrainedBeside):
    """A float32 copy of a module that is trained, beside the frozen original that `disabled` goes back to.

    Inputs are cast to the copy's type. An embedding's output is cast back to the original's type, so that the rest of the
    model computes as before; a head's stays float32, where a loss wants it.
    """

    def __init__(self, original: nn.Module, gathered: Gathered, shared: dict[int, nn.Parameter]) -> None:
        super().__init__()
        self.original = original
        self.enabled = True
        self.is_embedding = isinstance(original, nn.Embedding)
        dtypes = [p.dtype for p in original.parameters() if p.is_floating_point()]
        self.dtype = dtypes[0] if dtypes else torch.float32
        self.trained = _full_copy(original, gathered, shared)

    @property
    def weight(self) -> nn.Parameter:
        return self.trained.weight if self.enabled else self.original.weight  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.original(x, *args, **kwargs)
        trained_dtype = next(self.trained.parameters()).dtype
        y = self.trained(x.to(trained_dtype) if x.is_floating_point() else x, *args, **kwargs)
        return y.to(self.dtype) if self.is_embedding else y

    def plain_module(self) -> nn.Module:
        return self.trained

    def trainables(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.trained.named_parameters() if p.requires_grad}

    def file_tensors(self) -> dict[str, Tensor]:
        """As the base's own checkpoint has them, which is how PEFT reads them."""
        turned = self._turned()
        return {name: p.detach().t() if name in turned else p.detach() for name, p in self.trainables().items()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        turned = self._turned()
        for name, parameter in self.trainables().items():
            parameter.data.copy_(tensors[name].t() if name in turned else tensors[name])

    def _turned(self) -> set[str]:
        """The names of weights that are Conv1D's in the base."""
        linear = {name: m for name, m in self.trained.named_modules() if isinstance(m, TrainedLinear) and m.conv1d}
        return {f"{name}.weight" if name else "weight" for name in linear}


class TrainedLinear(nn.Module):
    """A linear layer trained in full: `weight (d_out, d_in)`, `bias (d_out,)` or None; conv1d: its checkpoint holds
    `(d_in, d_out)`."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, conv1d: bool = False) -> None:
        super().__init__()
        self.conv1d = conv1d
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def _full_copy(original: nn.Module, gathered: Gathered, shared: dict[int, nn.Parameter]) -> nn.Module:
    """The module with float32 parameters of its own; frozen operators in it become linear layers that can be trained.
    `shared` maps a frozen parameter to its one trained copy, so that tied modules stay tied."""
    with gathered(list(original.parameters())), torch.no_grad():
        operators = [m for m in original.modules() if isinstance(m, Operator)]
        memo: dict[int, Any] = {id(m): _linear_copy(m, shared) for m in operators}
        inside = {id(p) for m in operators for p in m.parameters()}
        rest = [p for p in original.parameters() if id(p) not in inside]
        memo |= {id(p): _trained(p, p.detach(), shared) for p in rest}
        return copy.deepcopy(original, memo)


def _linear_copy(original: Operator, shared: dict[int, nn.Parameter]) -> nn.Module:
    held = next(original.parameters())  # whatever the storage calls it: tied layers hold the same one
    weight = _trained(held, original.dense(torch.float32), shared)
    bias = None if original.bias is None else _trained(original.bias, original.bias.detach(), shared)
    return TrainedLinear(weight, bias, getattr(original, "conv1d", False))


def _trained(key: nn.Parameter, value: Tensor, shared: dict[int, nn.Parameter]) -> nn.Parameter:
    if id(key) not in shared:
        floating = value.to(torch.float32) if value.is_floating_point() else value
        shared[id(key)] = nn.Parameter(floating.clone(), requires_grad=value.is_floating_point())
    return shared[id(key)]
