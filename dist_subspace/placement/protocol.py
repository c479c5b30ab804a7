"""What the rest of the package asks of a placement, in three protocols.

Two implementations: `whole` (plain torch, one process) and `deepspeed` (ZeRO). The modules beside this one choose between them:
`tensors.py` for `Bytes`, `edits.py` for `OptimizerPieces`, `engines.py` for `Engine`, `for_loading.py` for `Splitter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Bytes(Protocol):
    """Where a parameter's bytes lie. Asked only of parameters that it `holds`."""

    def holds(self, parameter: Tensor) -> bool:
        """Whether this placement keeps the parameter."""

    def full_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of the whole parameter."""

    def kept(self, parameter: Tensor) -> tuple[Tensor, int]:
        """What this rank keeps between steps, flat, to be read; and its first element's place in the whole."""

    def kept_bytes(self, parameter: Tensor) -> int:
        """Bytes that this rank keeps between steps."""

    def gathered_bytes(self, parameter: Tensor) -> int:
        """Bytes that are gathered on this rank now, beside what it keeps."""

    def needs_other_ranks(self, parameter: Tensor) -> bool:
        """Whether a forward would wait for other ranks' parts of it now."""

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Collective: within the block they are whole on every rank, and only read."""

    def gather_to(self, parameter: Tensor, rank: int) -> Tensor | None:
        """Collective: the whole parameter on one rank, None on the others."""

    def overwrite(self, parameter: Tensor, whole: Tensor) -> None:
        """Give the parameter other values, on this rank its part of them."""

    def read_by_forward(self, parameter: Tensor) -> list[tuple[Tensor, int]]:
        """Where the values lie that a forward reads, to be written: flat tensors, and each one's place in the whole."""


class OptimizerPieces(Protocol):
    """What an optimizer holds of a parameter on this rank, found from the parameter alone: in a loop that is not ours."""

    def holds(self, parameter: Tensor) -> bool:
        """Whether this placement keeps the optimizer's state of the parameter."""

    def is_reached(self, parameter: Tensor) -> bool:
        """Whether every copy of the parameter is known."""

    def edit_master(self, parameter: Tensor, write: Callable[[Tensor, int], None]) -> None:
        """`write(flat, first)` on the float32 copy that the optimizer keeps apart, if it keeps one."""

    def clear_moments(self, parameter: Tensor, clear: Callable[[Tensor, int, float], None]) -> None:
        """`clear(flat, first, zero)` on every moment; `zero` is zero as that moment holds it."""

    def counter(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's entry whose `step` counts the parameter's steps; empty where there is none."""


class Engine(Protocol):
    """Trains a model: gradients of micro-batches, steps of the optimizer, and the optimizer's state by parameter name."""

    @property
    def module(self) -> nn.Module:
        """The model that was given."""

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward."""

    def train(self, mode: bool = True) -> object:
        """Training mode, or evaluation mode."""

    def eval(self) -> object:
        """Evaluation mode."""

    @property
    def rates(self) -> list[float]:
        """The learning rate of each parameter group."""

    @rates.setter
    def rates(self, rates: Sequence[float]) -> None: ...

    @property
    def loss_scale(self) -> float:
        """By how much `backward` multiplies gradients; 1 without loss scaling."""

    @property
    def has_loss_scale(self) -> bool:
        """Whether a step that overflows is skipped to lower the scale."""

    def backward(self, loss: Tensor) -> None:
        """Collective: add the gradients of a micro-batch's loss to those of the step, averaged over the ranks."""

    def next_micro_batch(self) -> None:
        """Between two micro-batches of a step."""

    def step(self, finite: bool) -> bool:
        """Collective: clip, and make the optimizer's step unless the loss or a gradient is not finite; whether it was made."""

    def make_moments(self) -> None:
        """Collective: the optimizer's step on whatever gradients there are, at rates of zero: its moments exist then."""

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not made."""

    @property
    def grad_norm(self) -> float | None:
        """Of the last step's gradient before clipping, without loss scale; None where there is none."""

    def step_count(self) -> int:
        """How many steps the optimizer has counted."""

    def read_state(self, trainables: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Collective: `NAME.master` and `NAME.<moment>`, whole, float32, on the CPU (optimizer_state.py)."""

    def write_state(self, trainables: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], steps: int) -> None:
        """Collective: the inverse, after a first step has made the moments; `steps` is what the optimizer has counted."""

    def scaler_state(self) -> dict[str, float]:
        """Where dynamic loss scaling stands; empty without."""

    def restore_scaler(self, state: Mapping[str, float]) -> None:
        """The inverse."""


@dataclass(frozen=True)
class Part:
    """What a rank keeps of a flat parameter: the entries from `start` to `stop`, and zeros up to `length` of them."""

    start: int
    stop: int
    length: int


class Splitter(Protocol):
    """Where the parameters of a model lie while it is loaded, and who reads which part of them."""

    @property
    def device(self) -> torch.device:
        """Where whole parameters are made, and parts packed."""

    @property
    def splits(self) -> bool:
        """Whether a rank keeps a part only."""

    @property
    def takes_parts(self) -> bool:
        """Whether this rank's parts can be placed without the whole, alike on every rank."""

    def hold(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Parameter, Part, Tensor]:
        """A frozen parameter, the part of it that this rank reads, and zeros of that length, flat, to be filled."""

    def place(self, parameter: nn.Parameter) -> None:
        """Keep what this rank keeps of a whole parameter, and let the rest go."""

    def summed(self, tensor: Tensor) -> Tensor:
        """Collective: the sum over the ranks that read parts of one whole together."""

    def of_first(self, value: T) -> T:
        """Collective: the first rank's value."""

    def of_all(self, value: T) -> list[T]:
        """Collective: the values of all ranks that load the model."""

    def complete(self) -> None:
        """Collective: what a rank keeps of the parameters of `hold` and has not read, it gets from those that have."""
