"""Where tensors lie, asked of whoever holds them: a parameter that ZeRO-3 has split, or one that is whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from dist_subspace.placement.collectives import agreed, is_distributed, message_device, world
from dist_subspace.placement.deepspeed import partitioner, shards
from dist_subspace.placement.protocol import Bytes
from dist_subspace.placement.whole import parameters as whole_parameters

T = TypeVar("T")

_SPLIT: Bytes = shards
_WHOLE: Bytes = whole_parameters


def _holder(parameter: Tensor) -> Bytes:
    return _SPLIT if is_partitioned(parameter) else _WHOLE


def is_partitioned(parameter: Tensor) -> bool:
    """Whether the parameter is split over the ranks, be they several or one."""
    return _SPLIT.holds(parameter)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, split or not."""
    return _holder(parameter).full_shape(parameter)


def full_numel(parameter: Tensor) -> int:
    """Elements of the whole parameter."""
    return math.prod(full_shape(parameter))


def kept_bytes(parameter: Tensor) -> int:
    """Bytes of the parameter that this rank keeps between steps: its shard, or the whole."""
    return _holder(parameter).kept_bytes(parameter)


def resident_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of the parameters that lie on this rank at this moment: shards, and what is gathered; each counted once."""
    unique = {id(p): p for p in parameters}.values()
    return sum(kept_bytes(p) + _holder(p).gathered_bytes(p) for p in unique)


def is_split(model: nn.Module) -> bool:
    """Whether the model's forward needs other ranks: a parameter is split over several, and is not whole here now."""
    return any(_holder(p).needs_other_ranks(p) for p in model.parameters())


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Collective where parameters are split: within the block they are whole, and only read."""
    with _SPLIT.gathered([p for p in parameters if is_partitioned(p)]):
        yield


def split_like(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Local, alike on every rank: where the model's parameters are split, split these new whole ones too."""
    partitioner.split_like(model, parameters)


def gather_to(parameter: Tensor, rank: int) -> Tensor | None:
    """Collective where the parameter is split: the whole of it on one rank, None on the others."""
    return _holder(parameter).gather_to(parameter, rank)


@contextmanager
def with_data(tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Local: within the block each parameter's data is the given whole tensor, and is only read."""
    before = {parameter: parameter.data for parameter in tensors}
    try:
        for parameter, whole in tensors.items():
            parameter.data = whole
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


def whole_on_main(parameters: Iterable[nn.Parameter], what: str, function: Callable[[], T]) -> T | None:
    """Collective where the parameters are split: `function()` on rank 0, with whole parameters; None on the others, which hold
    no more than before. What it raises, every rank raises.

    Arguments:
        what: rank 0 is doing, for the other ranks' error.
    """
    gathered = {parameter: gather_to(parameter, 0) for parameter in parameters}
    with agreed(what), torch.no_grad():
        if world().is_main:
            with with_data({parameter: whole for parameter, whole in gathered.items() if whole is not None}):
                return function()
    return None


def overwrite(parameter: Tensor, whole: Tensor) -> None:
    """Local, alike on every rank: a frozen parameter gets another value; where it is split, this rank's shard of it."""
    _holder(parameter).overwrite(parameter, whole)


def read_by_forward(parameter: Tensor) -> list[tuple[Tensor, int]]:
    """Local: where this rank holds the values that a forward reads, as (flat tensor, its first element's place in the whole)."""
    return _holder(parameter).read_by_forward(parameter)


def checksums(groups: Sequence[Sequence[Tensor]]) -> list[int]:
    """Collective: a number for each group of parameters, the same however they are split over however many ranks.

    The sum, modulo 2^64, of each stored element's bits times a weight of its place in the whole.
    """
    sums = torch.tensor([sum(map(_weighted_bits, group)) % 2**63 for group in groups], dtype=torch.int64)
    if is_distributed() and any(is_partitioned(p) for group in groups for p in group):
        sums = sums.to(message_device())
        torch.distributed.all_reduce(sums)
    return [int(value) % 2**63 for value in sums.tolist()]


_PLACES = 1 << 20  # elements at a time


def _weighted_bits(parameter: Tensor) -> int:
    """This rank's part of the sum. Elements are read as integers of their own size; padding lies beyond the whole."""
    held, start = _holder(parameter).kept(parameter)
    bits = held.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()])
    length = max(0, min(held.numel(), full_numel(parameter) - start))
    total = 0
    for first in range(0, length, _PLACES):
        piece = bits[first : min(first + _PLACES, length)].long()
        places = torch.arange(start + first, start + first + piece.numel(), device=piece.device)
        total += int((piece * ((places * 2654435761 + 40503) & 0x7FFFFFFF)).sum())
    return total
