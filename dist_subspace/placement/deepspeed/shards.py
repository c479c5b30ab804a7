"""What ZeRO-3 keeps on a parameter: its shard, its whole shape, and how the whole is had for a while.

Read against deepspeed 0.19.8 (`runtime/zero/partition_parameters.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_zero.py fails when it moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.placement.collectives import is_distributed, message_device, world
from dist_subspace.placement.deepspeed.process_group import agreed_device


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has split the parameter over ranks (`ds_id`)."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter, split or not (`ds_shape`)."""
    return tuple(parameter.ds_shape) if is_partitioned(parameter) else tuple(parameter.shape)


def full_numel(parameter: Any) -> int:
    return int(parameter.ds_numel) if is_partitioned(parameter) else parameter.numel()


def kept_bytes(parameter: Any) -> int:
    """Bytes of the parameter that this rank keeps between steps: its shard, or the whole."""
    if is_partitioned(parameter):
        shard = parameter.ds_tensor
        return 0 if shard is None else shard.numel() * shard.element_size()
    return parameter.numel() * parameter.element_size()


def gathered_bytes(parameter: Any) -> int:
    """Bytes of a split parameter that are gathered on this rank at this moment, beside its shard."""
    if not is_partitioned(parameter) or parameter.data.numel() <= 1:
        return 0
    shared = parameter.ds_tensor is not None and parameter.data.data_ptr() == parameter.ds_tensor.data_ptr()
    return 0 if shared else parameter.data.numel() * parameter.data.element_size()


def resident_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of the parameters that lie on this rank at this moment: shards, and what is gathered; each counted once."""
    unique = {id(p): p for p in parameters}.values()
    return sum(kept_bytes(p) + gathered_bytes(p) for p in unique)


def own_shard(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that is split as the partitioned parameter is: flat, zeros after the end.

    Uses `ds_process_group`, the ranks that the parameter is split over, and the padded length of `ds_tensor`.
    """
    length = parameter.ds_tensor.numel()
    start = min(length * torch.distributed.get_rank(parameter.ds_process_group), whole.numel())
    part = whole.reshape(-1)[start : start + length]
    return torch.nn.functional.pad(part, (0, length - part.numel()))


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Collective where parameters are split: within the block they are whole, and only read. What is whole between steps
    (`keep_trainables_whole`) is left as it is: DeepSpeed would release it at the end of the block."""
    import deepspeed

    split = [p for p in parameters if is_partitioned(p) and not _is_whole(p)]
    with deepspeed.zero.GatheredParameters(split) if split else nullcontext():
        yield


def is_split(model: nn.Module) -> bool:
    """Whether the model's forward needs other ranks: a parameter is split over several, and is not whole here now."""
    split = (p for p in model.parameters() if is_partitioned(p) and not _is_whole(p))
    return any(torch.distributed.get_world_size(p.ds_process_group) > 1 for p in split)  # type: ignore[attr-defined]


def is_registered(model: nn.Module) -> bool:
    """Whether an engine gathers the model's parameters when its modules are called (`ds_id` of a module)."""
    return hasattr(model, "ds_id")


def _is_whole(parameter: Any) -> bool:
    """Whether a split parameter is gathered on every rank at this moment (`ds_status`)."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return parameter.ds_status is ZeroParamStatus.AVAILABLE


@contextmanager
def rewritten(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Collective where parameters are split: within the block they are whole; what rank 0 writes becomes everyone's."""
    import deepspeed

    split = [p for p in parameters if is_partitioned(p)]
    with deepspeed.zero.GatheredParameters(split, modifier_rank=0) if split else nullcontext():
        yield


def gather_to(parameter: Any, rank: int) -> Tensor | None:
    """Collective where the parameter is split: the whole of it on one rank, None on the others.

    Uses `ds_tensor`, `ds_numel`, `ds_shape` and `ds_process_group`; `all_gather`, DeepSpeed's own way, would put the whole on
    every rank. Shards that were offloaded travel over the device that the process group can send from.
    """
    if not is_partitioned(parameter):
        return parameter.data if world().rank == rank else None
    shard = parameter.ds_tensor.data.to(agreed_device())
    group = parameter.ds_process_group
    if torch.distributed.get_world_size(group) == 1:
        return shard[: parameter.ds_numel].view(parameter.ds_shape) if world().rank == rank else None
    own = torch.distributed.get_rank() == rank
    parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(group))] if own else None
    torch.distributed.gather(shard, parts, dst=rank, group=group)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape) if parts is not None else None


@contextmanager
def lent(wholes: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Local: within the block the parameters hold the given whole tensors, and are only read."""
    before = {parameter: parameter.data for parameter in wholes}
    try:
        for parameter, whole in wholes.items():
            parameter.data = whole
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


def overwrite(parameter: Any, whole: Tensor) -> None:
    """Local, alike on every rank: a frozen parameter gets another value; where it is split, this rank's shard of it."""
    if is_partitioned(parameter):
        parameter.ds_tensor.data.copy_(own_shard(parameter, whole.to(parameter.ds_tensor.device)))
    else:
        parameter.data.copy_(whole.view(parameter.shape))


def places(parameter: Any) -> list[tuple[Tensor, int]]:
    """Local: where this rank holds the values that the forward reads, as (flat tensor, its first element's place in the
    whole): the parameter; where it is split the shard, and the whole of it while it is gathered."""
    if not is_partitioned(parameter):
        return [(parameter.data.view(-1), 0)]
    shard = parameter.ds_tensor.data.view(-1)
    found = [(shard, shard.numel() * torch.distributed.get_rank(parameter.ds_process_group))]
    return [*found, (parameter.data.view(-1), 0)] if _is_whole(parameter) else found


def checksums(groups: Sequence[Sequence[Any]]) -> list[int]:
    """Collective: a number for each group of parameters, the same however they are split over however many ranks.

    The sum, modulo 2^64, of each stored element's bits times a weight of its place in the whole.
    """
    sums = torch.tensor([sum(map(_weighted_bits, group)) % 2**63 for group in groups], dtype=torch.int64)
    if is_distributed() and any(is_partitioned(p) for group in groups for p in group):
        sums = sums.to(message_device())
        torch.distributed.all_reduce(sums)
    return [int(value) % 2**63 for value in sums.tolist()]


_PLACES = 1 << 20  # elements at a time


def _weighted_bits(parameter: Any) -> int:
    """This rank's part of the sum. Elements are read as integers of their own size; padding lies beyond the whole."""
    split = is_partitioned(parameter)
    held = (parameter.ds_tensor.data if split else parameter.data).reshape(-1)
    start = held.numel() * torch.distributed.get_rank(parameter.ds_process_group) if split else 0
    bits = held.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()])
    length = max(0, min(held.numel(), full_numel(parameter) - start))
    total = 0
    for first in range(0, length, _PLACES):
        piece = bits[first : min(first + _PLACES, length)].long()
        places = torch.arange(start + first, start + first + piece.numel(), device=piece.device)
        total += int((piece * ((places * 2654435761 + 40503) & 0x7FFFFFFF)).sum())
    return total


def release_gathered(engine: Any) -> None:
    """Let go of frozen weights that a forward without backward left gathered (`empty_partition_cache`)."""
    if hasattr(engine, "empty_partition_cache"):
        engine.empty_partition_cache()
