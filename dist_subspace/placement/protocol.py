"""What the rest of the package asks of a placement, in three protocols.

Two implementations: `whole` (plain torch, one process) and `deepspeed` (ZeRO). The modules beside this one choose between them:
`tensors.py` for `Bytes`, `edits.py` for `OptimizerPieces`, `engines.py` for `Engine`, `for_loading.py` for `Splitter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


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
    """Splits the parameters of a model over the ranks as they are read."""

    @property
    def device(self) -> torch.device:
        """Where whole parameters are made."""

    @property
    def takes_parts(self) -> bool:
        """Whether this rank's parts can be placed without the whole, alike on every rank."""

    def parts(self, numel: int) -> Sequence[Part]:
        """What this rank keeps of a parameter of so many entries."""

    def zeros(self, length: int, dtype: torch.dtype) -> Tensor:
        """Memory for a part, where parts lie."""

    def place_parts(self, parameter: nn.Parameter, held: Sequence[Tensor]) -> None:
        """Take the memory of the rank's parts, flat and of their lengths, as what it keeps of a parameter whose values are not
        here (`placeholder`)."""

    def placeholder(self, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        """A frozen parameter of a shape and type, for `place_parts`; it takes no memory."""

    def place(self, parameter: nn.Parameter) -> None:
        """Keep this rank's part of a whole parameter, and let the rest go."""
