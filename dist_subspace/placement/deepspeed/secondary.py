"""The second shard of a frozen parameter under ZeRO++'s hierarchical partitioning (`zero_hpz_partition_size`): the parameter
split once more over a few ranks that lie near each other, from which it is gathered without a word to the others.

Read against deepspeed 0.19.8 (`runtime/zero/partition_parameters.py`, `runtime/zero/stage3.py`, `utils/groups.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_secondary.py fails when it moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import message_device
from dist_subspace.placement.deepspeed.json_file import zero_stage

KEY = "zero_hpz_partition_size"
SENT = 1 << 23  # bytes of all ranks that are on their way at a time


def partition_size(config: Mapping[str, Any]) -> int:
    """Ranks that a second shard is split over; 1 where there is none."""
    section = config.get("zero_optimization")
    size = section.get(KEY, 1) if isinstance(section, Mapping) else 1
    return 1 if size == "auto" else max(1, int(size))


def check_partition_size(config: Mapping[str, Any], world_size: int) -> None:
    """Local: refuse a size that DeepSpeed would ignore or fail at.

    Raises:
        UsageError: naming the size and what contradicts it.
    """
    size, stage = partition_size(config), zero_stage(config)
    if size == 1:
        return
    given = f"deepspeed.config zero_optimization.{KEY} is {size}"
    if stage < 3:
        raise UsageError(f"{given} at stage {stage}, where no weight is split; accepted: stage 3, or 1")
    if world_size % size or size >= world_size:
        raise UsageError(
            f"{given}, and there are {world_size} ranks; accepted: 1, or a number below the ranks that divides them (the ranks "
            "of a node)"
        )
    target = config["zero_optimization"].get("offload_param") or {}
    if isinstance(target, Mapping) and target.get("device") == "nvme":
        raise UsageError(f"{given}, but DeepSpeed keeps no second shard on NVMe; accepted: 1, or offload_param to cpu")


def near_group(size: int) -> Any:
    """Collective: the process group of this rank and those that its second shards are split with: `size` ranks whose numbers
    follow one another.

    DeepSpeed keeps one such group for the whole process (`_ZERO_PARAM_INTRA_PARALLEL_GROUP`), reads its size from there, and
    asserts that there is none when it makes it (`_create_zero_param_parallel_group`): a second model would fail.
    """
    from deepspeed.utils import groups

    group = groups._get_zero_param_intra_parallel_group()
    if group is None or torch.distributed.get_world_size(group) != size:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()


def keep_for_frozen_alone(init: Any) -> None:
    """Let `Init` keep second shards of frozen parameters alone (`_partition_param_sec`, which `partition` calls).

    A trained parameter's changes with each step, and DeepSpeed takes the old one away after it has gathered what stays whole
    (`_post_step`): where that is gathered in one call, the old values would come back, step after step.
    """
    keep = init._partition_param_sec

    def of_frozen(param: Any, *args: Any, **kwargs: Any) -> None:
        if not param.requires_grad:
            keep(param, *args, **kwargs)

    init._partition_param_sec = of_frozen


def forget(parameters: Iterable[Any]) -> None:
    """Local, alike on every rank: the next gather of these comes from the first shards of all ranks (`ds_secondary_tensor`)."""
    for parameter in parameters:
        parameter.ds_secondary_tensor = None


def fill_from_first(first: torch.Tensor, second: torch.Tensor, start: int, group: Any) -> None:
    """Collective: write a second shard, which begins at the entry `start` of the whole, from the first shards of all ranks, which
    are alike in length and follow one another; a piece of each is on its way at a time."""
    ranks, length = torch.distributed.get_world_size(group), first.numel()
    step = max(1, SENT // (ranks * first.element_size()))
    numbers = range(start // length, min(ranks, -(-(start + second.numel()) // length))) if length else range(0)
    for at in range(0, length, step):
        own = first[at : at + step].view(torch.int8).to(message_device())
        pieces = [torch.empty_like(own) for _ in range(ranks)]
        torch.distributed.all_gather(pieces, own, group=group)
        for number in numbers:
            piece = pieces[number].view(first.dtype)
            place = number * length + at - start
            second[place : place + piece.numel()].copy_(piece)


def second_shard(parameter: Any) -> tuple[torch.Tensor, int] | None:
    """This rank's second shard, flat, with the padding after the whole's end, and its first element's place in the whole; None
    where there is none (`ds_secondary_tensor`, `ds_zero_param_process_group`)."""
    shard = getattr(parameter, "ds_secondary_tensor", None)
    if shard is None:
        return None
    flat = shard.data.reshape(-1)
    return flat, flat.numel() * torch.distributed.get_rank(parameter.ds_zero_param_process_group)
