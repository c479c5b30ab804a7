"""Splitting parameters over the ranks as they are made.

Read against deepspeed 0.19.8 (`runtime/zero/partition_parameters.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_zero.py fails when it moves.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dist_subspace.pages import zeros_in_pages
from dist_subspace.placement.collectives import broadcast_object, gather_objects, summed_over_ranks, world
from dist_subspace.placement.deepspeed.secondary import (
    check_partition_size,
    fill_from_first,
    keep_for_frozen_alone,
    near_group,
    partition_size,
)
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.protocol import Part

T = TypeVar("T")


class Partitioner:
    """Splits parameters over the ranks as they are made, one at a time.

    Uses `Init._convert_to_deepspeed_param` and the `partition` method that it puts on the parameter, with the real whole
    tensor in hand (never a placeholder: a second shard, which is cut from it as well, would stay zeros). `Init`'s own way
    broadcasts rank 0's bytes first; every rank has read the same file, so nothing is sent.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Collective where second shards are kept.

        Raises:
            UsageError: second shards that cannot be.
        """
        import deepspeed

        check_partition_size(config, world().size)
        os.environ.setdefault("LOCAL_RANK", "0")  # Init reads it from the environment
        size = partition_size(config)
        minimal = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": _without_auto(config["zero_optimization"])}
        near = near_group(size) if size > 1 else None
        self._init = deepspeed.zero.Init(config_dict_or_path=minimal, zero_param_parallel_group=near)
        keep_for_frozen_alone(self._init)
        # First shard, second one, and where in the whole that begins.
        self._unfilled: list[tuple[Tensor, Tensor, int]] = []
        self.device = self._init.local_device

    def place(self, parameter: nn.Parameter) -> None:
        """Keep this rank's shard of a whole parameter, and let the rest go."""
        if is_partitioned(parameter):
            return
        parameter.data = parameter.data.to(self.device)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]

    splits = True

    @property
    def takes_parts(self) -> bool:
        """Only what has been seen to be right: shards where the ranks compute, or in CPU memory. Those on NVMe and quantised by
        ZeRO itself are cut from the whole (`param_swapper`, `quantized_nontrainable_weights`)."""
        init: Any = self._init
        return init.param_swapper is None and not init.quantized_nontrainable_weights

    def hold(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Parameter, Part, Tensor]:
        """A split parameter whose shards are zeros yet, and the first of them to be filled. What `partition` leaves behind it
        (`_partition_param`: `ds_tensor` with `ds_numel`, `status` and `final_location`, `ds_numel_aligned`, `free_param`,
        `ds_status`; `ds_secondary_tensor` likewise). `partition` itself, or `Init` as a context, would read the placeholder."""
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus, free_param

        init, parts = self._init, self._parts(torch.Size(shape).numel())
        # One entry, seen as often as the shape has them: it takes no memory.
        parameter = nn.Parameter(torch.zeros((), dtype=dtype, device=self.device).expand(shape), requires_grad=False)
        shards: list[Any] = [self._zeros(part.length, dtype) for part in parts]
        init._convert_to_deepspeed_param(parameter)
        for shard in shards:
            shard.ds_numel, shard.status, shard.final_location = shard.numel(), PartitionedParamStatus.AVAILABLE, None
        split = cast(Any, parameter)
        split.ds_tensor, split.ds_secondary_tensor = shards[0], shards[1] if len(shards) > 1 else None
        split.ds_numel_aligned = shards[0].numel() * torch.distributed.get_world_size(init.ds_process_group)
        free_param(parameter)
        split.ds_status = ZeroParamStatus.NOT_AVAILABLE
        if len(shards) > 1:
            near = torch.distributed.get_rank(init.zero_param_process_group)
            self._unfilled.append((shards[0], shards[1], near * parts[1].length))
        return parameter, parts[0], shards[0]

    def _parts(self, numel: int) -> Sequence[Part]:
        """The shard, and the second one where there are such, which are alike in length on every rank, as `partition` cuts them
        (`_aligned_size`, `ds_process_group`, `zero_param_process_group`, `_partition_param_sec`)."""
        everyone, near = self._init.ds_process_group, self._init.zero_param_process_group
        length = -(-numel // torch.distributed.get_world_size(everyone))
        first = _part(numel, length, torch.distributed.get_rank(everyone))
        if near is None:
            return (first,)
        second = length * torch.distributed.get_world_size(everyone) // torch.distributed.get_world_size(near)
        return first, _part(numel, second, torch.distributed.get_rank(near))

    def _zeros(self, length: int, dtype: torch.dtype) -> Tensor:
        """Where and how `partition` keeps shards (`remote_device`, `pin_memory`)."""
        from deepspeed.accelerator import get_accelerator

        device = torch.device(str(getattr(self._init.remote_device, "value", self._init.remote_device)))
        if device.type != "cpu":
            return torch.zeros(length, dtype=dtype, device=device)
        zeros = zeros_in_pages(length, dtype)
        return get_accelerator().pin_memory(zeros) if self._init.pin_memory else zeros

    def summed(self, tensor: Tensor) -> Tensor:
        return summed_over_ranks(tensor)

    def of_first(self, value: T) -> T:
        return broadcast_object(value)

    def of_all(self, value: T) -> list[T]:
        return gather_objects(value)

    def complete(self) -> None:
        """Collective: second shards are made of the first shards of all ranks, a piece of each at a time."""
        while self._unfilled:
            first, second, start = self._unfilled.pop(0)
            fill_from_first(first, second, start, self._init.ds_process_group)


def _part(numel: int, length: int, rank: int) -> Part:
    start = min(numel, length * rank)
    return Part(start, min(numel, start + length), length)


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Modules are made plain although the caller is inside `zero.Init` (`shutdown_init_context`, as DeepSpeed's engine does)."""
    split: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    active = getattr(getattr(split, "top_level_context", None), "patched", False)
    if active:
        split.shutdown_init_context()
    try:
        yield
    finally:
        if active:
            split.restore_init_context()


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """A section of a stock JSON without the values that only a trainer can resolve."""
    return {key: value for key, value in copy.deepcopy(section).items() if value != "auto"}


_PARTITIONERS: WeakKeyDictionary[nn.Module, Partitioner] = WeakKeyDictionary()


def remember_partitioner(model: nn.Module, partitioner: Partitioner) -> None:
    """What splits the model's weights splits what is added to it later."""
    _PARTITIONERS[model] = partitioner


def split_like(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Local, alike on every rank: where the model's parameters are split, split these new whole ones too."""
    if not any(is_partitioned(p) for p in model.parameters()):
        return
    partitioner = _PARTITIONERS.get(model)
    if partitioner is None:
        partitioner = _PARTITIONERS[model] = Partitioner({"zero_optimization": {"stage": 3}})
    for parameter in parameters:
        partitioner.place(parameter)
