"""A parameter that ZeRO-3 has split: its shard, its whole shape, and how the whole is had for a while (`Bytes`).

Read against deepspeed 0.19.8 (`runtime/zero/partition_parameters.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_zero.py fails when it moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.process_group import agreed_device
from dist_subspace.placement.deepspeed.secondary import second_shard


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has split the parameter over ranks (`ds_id`)."""
    return hasattr(parameter, "ds_id")


def holds(parameter: Tensor) -> bool:
    """ZeRO-3's own."""
    return is_partitioned(parameter)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter (`ds_shape`)."""
    return tuple(parameter.ds_shape)


def kept(parameter: Any) -> tuple[Tensor, int]:
    """This rank's shard, with the padding after the whole's end."""
    shard = parameter.ds_tensor.data.reshape(-1)
    return shard, shard.numel() * torch.distributed.get_rank(parameter.ds_process_group)


def kept_bytes(parameter: Any) -> int:
    """Bytes of the shard, and of the second one where there is one."""
    second = second_shard(parameter)
    shards = [parameter.ds_tensor, None if second is None else second[0]]
    return sum(shard.numel() * shard.element_size() for shard in shards if shard is not None)


def gathered_bytes(parameter: Any) -> int:
    """Bytes that are gathered on this rank at this moment, beside its shard."""
    if parameter.data.numel() <= 1:
        return 0
    shared = parameter.ds_tensor is not None and parameter.data.data_ptr() == parameter.ds_tensor.data_ptr()
    return 0 if shared else parameter.data.numel() * parameter.data.element_size()


def own_shard(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that is split as the partitioned parameter is: flat, zeros after the end.

    Uses `ds_process_group`, the ranks that the parameter is split over, and the padded length of `ds_tensor`.
    """
    length = parameter.ds_tensor.numel()
    return _cut(whole, length * torch.distributed.get_rank(parameter.ds_process_group), length)


def _cut(whole: Tensor, start: int, length: int) -> Tensor:
    part = whole.reshape(-1)[min(start, whole.numel()) : start + length]
    return torch.nn.functional.pad(part, (0, length - part.numel()))


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Collective: within the block they are whole, and only read. What is whole between steps (`keep_trainables_whole`) is left
    as it is: DeepSpeed would release it at the end of the block."""
    split = [p for p in parameters if not _is_whole(p)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


def needs_other_ranks(parameter: Any) -> bool:
    """Whether it is split over several, and not whole here now."""
    return not _is_whole(parameter) and torch.distributed.get_world_size(parameter.ds_process_group) > 1


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
    """Collective: the whole parameter on one rank, None on the others.

    Uses `ds_tensor`, `ds_numel`, `ds_shape` and `ds_process_group`; `all_gather`, DeepSpeed's own way, would put the whole on
    every rank. Shards that were offloaded travel over the device that the process group can send from.
    """
    shard = parameter.ds_tensor.data.to(agreed_device())
    group = parameter.ds_process_group
    if torch.distributed.get_world_size(group) == 1:
        return shard[: parameter.ds_numel].view(parameter.ds_shape) if world().rank == rank else None
    receives = torch.distributed.get_rank() == rank
    parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(group))] if receives else None
    torch.distributed.gather(shard, parts, dst=rank, group=group)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape) if parts is not None else None


def overwrite(parameter: Any, whole: Tensor) -> None:
    """Local, alike on every rank: this rank's shards of another value."""
    parameter.ds_tensor.data.copy_(own_shard(parameter, whole.to(parameter.ds_tensor.device)))
    second = second_shard(parameter)
    if second is not None:
        shard, start = second
        shard.copy_(_cut(whole.to(shard.device), start, shard.numel()))


def read_by_forward(parameter: Any) -> list[tuple[Tensor, int]]:
    """The shard, and the whole parameter while it is gathered."""
    shard = parameter.ds_tensor.data.view(-1)
    pieces = [(shard, shard.numel() * torch.distributed.get_rank(parameter.ds_process_group))]
    return [*pieces, (parameter.data.view(-1), 0)] if _is_whole(parameter) else pieces
