"""Splitting parameters over the ranks as they are made.

Read against deepspeed 0.19.8 (`runtime/zero/partition_parameters.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_zero.py fails when it moves.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.secondary import (
    check_partition_size,
    keep_for_frozen_alone,
    near_group,
    partition_size,
)
from dist_subspace.placement.deepspeed.shards import is_partitioned


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
        self.device = self._init.local_device

    def place(self, parameter: nn.Parameter) -> None:
        """Keep this rank's shard of a whole parameter, and let the rest go."""
        if is_partitioned(parameter):
            return
        parameter.data = parameter.data.to(self.device)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]


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
