"""What a method sees of a frozen matrix: an operator that answers three questions, and the matrix laid open for a statistic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.linear_map import Gate


def no_original() -> Tensor:
    """For a weight that was never read from a checkpoint."""
    raise UsageError(
        "these settings need the checkpoint's own matrices, but the model was not read from one by load_frozen; accepted: a "
        "model of load_frozen, or settings that do without (residual: stacked, init: kaiming)"
    )


@runtime_checkable
class Operator(Protocol):
    """The three questions: `operator(x)`, `in_features` and `out_features`, `dense()`. The bias belongs to the method.

    `operator(x, gate, branch)` is `W x + (W ⊙ Δ) branch`, for a method that changes W entry by entry."""

    in_features: int
    out_features: int
    training: bool
    if TYPE_CHECKING:  # isinstance does not ask for it: from Python 3.12 on it would not see a module's parameters
        bias: nn.Parameter | None

    def __call__(self, x: Tensor, gate: Gate | None = None, branch: Tensor | None = None) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def dense(self, dtype: torch.dtype = ...) -> Tensor: ...


@runtime_checkable
class Stack(Protocol):
    """The frozen matrices of a mixture's experts."""

    experts: int
    expert_shape: tuple[int, int]
    storage: str

    def __call__(self, x: Tensor, counts: Sequence[int], each: Any = None) -> Tensor: ...

    def operator(self, number: int) -> Any: ...


class Weights(Protocol):
    """The `Weight` of each of a stack's experts, laid open when it is asked for."""

    def __getitem__(self, number: int) -> Weight: ...


@dataclass(frozen=True)
class Weight:
    """A frozen matrix laid open for a decomposition, on the one rank that makes it.

    matrix: `(d_out, d_in)` float32, the weight that the forward really uses.
    original: the checkpoint's own matrix, `(d_out, d_in)` float32; UsageError where it is not to be had.
    quantised: what the layer's storage makes of a matrix, float32; None where the storage is a float type.
    generator: for random projections; a function of the run's seed and the layer's name.
    """

    matrix: Tensor
    original: Callable[[], Tensor]
    quantised: Callable[[Tensor], Tensor] | None
    generator: torch.Generator
