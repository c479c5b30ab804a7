"""A parameter that is whole on its rank, and what a plain optimizer of torch holds of it: `Bytes` and `OptimizerPieces`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dist_subspace.placement.collectives import world
from dist_subspace.placement.optimizer_state import moment_keys, zero_of
from dist_subspace.placement.stepped import stepped


def holds(parameter: Tensor) -> bool:
    """Every parameter that nobody else holds."""
    return True


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)


def kept(parameter: Tensor) -> tuple[Tensor, int]:
    return parameter.data.reshape(-1), 0


def kept_bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def gathered_bytes(parameter: Tensor) -> int:
    return 0


def needs_other_ranks(parameter: Tensor) -> bool:
    return False


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


def gather_to(parameter: Tensor, rank: int) -> Tensor | None:
    return parameter.data if world().rank == rank else None


def overwrite(parameter: Tensor, whole: Tensor) -> None:
    parameter.data.copy_(whole.view(parameter.shape))


def read_by_forward(parameter: Tensor) -> list[tuple[Tensor, int]]:
    return [(parameter.data.view(-1), 0)]


def is_reached(parameter: Tensor) -> bool:
    """A float32 parameter is its own master; of a 16-bit one that no optimizer knows, somebody keeps a copy elsewhere."""
    return parameter.dtype == torch.float32 or any(parameter in optimizer.state for optimizer in stepped())


def edit_master(parameter: Tensor, write: Callable[[Tensor, int], None]) -> None:
    """The parameter is its own master."""


def clear_moments(parameter: Tensor, clear: Callable[[Tensor, int, float], None]) -> None:
    state = counter(parameter)
    for key in moment_keys(state):
        clear(state[key].view(-1), 0, zero_of(state, key))


def counter(parameter: Tensor) -> dict[str, Any]:
    return next((o.state[parameter] for o in stepped() if parameter in o.state), {})
