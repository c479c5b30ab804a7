"""What a method is: a frozen linear operator with something trained around it, in product form.

A method file holds, in this order: the formula and its reference; a registration; the parameters and their initial values;
the product form; merge; how the file names its tensors. It asks the operator three questions (apply, shape, dense) and
knows neither how the matrix is stored nor where its bytes lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Operator(Protocol):
    """The three questions: `operator(x)`, `in_features` and `out_features`, `dense()`. The bias belongs to the method."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    training: bool

    def __call__(self, x: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def dense(self, dtype: torch.dtype = ...) -> Tensor: ...


@dataclass(frozen=True)
class Option:
    """One entry of `subspace.options`: its default, the accepted values (None: any of the default's type), and what it does."""

    default: Any
    help: str
    accepted: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class MethodInfo:
    """The identity card of a method (methods.md 14.1)."""

    name: str
    category: str
    reference: str
    summary: str
    targets: str | tuple[str, ...] = "all-linear"
    uses_rank: bool = False
    rank: int | None = None
    alpha_over_rank: float | None = None
    uses_dropout: bool = False
    mergeable: bool = True
    statistic: str = "none"
    constraints: tuple[str, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    peft_type: str | None = None
    count: str = ""


@dataclass(frozen=True)
class Settings:
    """What one layer's method is built from: resolved values, nothing left open."""

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


class SubspaceLinear(nn.Module):
    """A frozen operator and its trained part: `y = W'(x) + b`.

    The operator is called as a module (`self.base(x)`), because a sharding engine gathers its bytes in module hooks, and
    once a forward where the maths allows it. Its bias moves here: methods disagree about what may scale it. Every trained
    parameter is on this module, whose `forward` reads it.

    Parameters are created in float32, whatever the type of the computation.
    """

    info: ClassVar[MethodInfo]
    bias: nn.Parameter | None

    def __init__(self, base: Operator, settings: Settings, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.settings = settings
        self.enabled = True
        self.register_parameter("bias", base.bias)
        base.bias = None
        self.create(settings, generator)

    # What a method provides.

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        """Make the parameters, equal on every rank: random draws come from `generator` (CPU) alone."""
        raise TypeError(f"{type(self).__name__} does not create its parameters")

    def transform(self, x: Tensor) -> Tensor:
        """`W' x` without the bias; x is `(..., in_features)`."""
        raise TypeError(f"{type(self).__name__} has no product form")

    def merged(self, weight: Tensor) -> Tensor:
        """`W'` from the dense `W`, both `(out_features, in_features)`, in W's type."""
        raise TypeError(f"{type(self).__name__} cannot be merged")

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained tensors as the adapter's file holds them, by suffix (`lora_A.weight`)."""
        raise TypeError(f"{type(self).__name__} does not say what its file holds")

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `file_tensors`."""
        raise TypeError(f"{type(self).__name__} cannot be read from a file")

    def shifted_bias(self, bias: Tensor) -> Tensor:
        """The bias that is added; methods that scale the output may scale it too."""
        return bias

    # What everyone uses.

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.transform(x) if self.enabled else self.base(x)
        if self.bias is None:
            return y
        bias = self.shifted_bias(self.bias) if self.enabled else self.bias
        return y + bias.to(y.dtype)

    @property
    def weight(self) -> Tensor | None:
        """The frozen parameter of that name. Some models ask their layers for its type (T5: `wo.weight.dtype`)."""
        return getattr(self.base, "weight", None)

    def trainables(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their own names."""
        return {name: p for name, p in self.named_parameters(recurse=False) if p.requires_grad}

    def extra_repr(self) -> str:
        return (
            f"method={self.info.name}, rank={self.settings.rank}" if self.info.uses_rank else f"method={self.info.name}"
        )
