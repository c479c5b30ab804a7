"""What an optimizer inside DeepSpeed holds of a parameter on this rank (`OptimizerPieces`): at stages 1 and 2 fragments of flat
tensors, at stage 3 a shard, and at stage 0 the master that a 16-bit engine keeps apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_subspace.placement.deepspeed.fragments import (
    has_fragments,
    link_moments,
    master_fragments,
    optimized_tensor,
)
from dist_subspace.placement.deepspeed.masters import linked_master
from dist_subspace.placement.deepspeed.shards import is_partitioned, kept
from dist_subspace.placement.optimizer_state import moment_keys, zero_of
from dist_subspace.placement.stepped import stepped


def holds(parameter: Tensor) -> bool:
    return is_partitioned(parameter) or has_fragments(parameter) or linked_master(parameter) is not None


def is_reached(parameter: Tensor) -> bool:
    return True


def edit_master(parameter: Tensor, write: Callable[[Tensor, int], None]) -> None:
    if not is_partitioned(parameter):
        fragments, first = master_fragments(parameter)
        if fragments:
            write(fragments[None], first)
    elif optimized_tensor(parameter) is not None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        master = safe_get_local_fp32_param(parameter).clone()
        write(master, kept(parameter)[1])
        safe_set_local_fp32_param(parameter, master)


def clear_moments(parameter: Tensor, clear: Callable[[Tensor, int, float], None]) -> None:
    if has_fragments(parameter):
        _clear_fragments(parameter, clear)
        return
    state = counter(parameter)
    for key in moment_keys(state):
        if is_partitioned(parameter):
            _clear_shard(parameter, key, clear)
        else:
            clear(state[key].view(-1), 0, zero_of(state, key))


def _clear_fragments(parameter: Tensor, clear: Callable[[Tensor, int, float], None]) -> None:
    for optimizer in stepped():
        link_moments(parameter, optimizer.state)
    fragments, first = master_fragments(parameter)
    for moment in (fragment for key, fragment in fragments.items() if key is not None):
        clear(moment, first, 0.0)


def _clear_shard(parameter: Tensor, key: str, clear: Callable[[Tensor, int, float], None]) -> None:
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    moment = safe_get_local_optimizer_state(parameter, key).clone()
    clear(moment, kept(parameter)[1], 0.0)
    safe_set_local_optimizer_state(parameter, moment, key)


def counter(parameter: Tensor) -> dict[str, Any]:
    """What the optimizer keeps for the flat tensor that the parameter is a piece of; empty where it is not known. A fragment is
    a view, so it lies in the memory of the tensor that the optimizer knows it by."""
    optimized = optimized_tensor(parameter)
    if optimized is None:
        return {}
    for optimizer in stepped():
        if optimized in optimizer.state:
            return _entry(optimizer, optimized)
    memory = optimized.untyped_storage().data_ptr()
    states = (item for optimizer in stepped() for item in optimizer.state.items())
    return next((state for key, state in states if key.untyped_storage().data_ptr() == memory), {})


def _entry(optimizer: torch.optim.Optimizer, optimized: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state[optimized]
    return state
