"""The state of DeepSpeed's engine by parameter name: read and written whole, the same at every ZeRO stage and number of ranks.

Uses DeepSpeed's public `safe_get_full_*` and `safe_set_*` functions (deepspeed 0.19.8) where ZeRO splits the state, and the
plain optimizer's own where nothing does. Four things are minded: the moments exist only after a first step; setting a
master copy does not refresh the parameter; Adam's step counters lie in the values of `optimizer.state`, under ZeRO-3 not
under the keys that `param_groups` shows; and ZeRO-3's `safe_set_full_*` fail where the ranks do not divide the parameter
(they cut the last shard out of the unpadded whole), so the rank's own shard is cut here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from dist_subspace.placement.deepspeed.fragments import forget_moments, has_fragments, link_moments
from dist_subspace.placement.deepspeed.masters import link_masters, linked_master
from dist_subspace.placement.deepspeed.shards import is_partitioned, own_shard, rewritten
from dist_subspace.placement.eight_bit import has_packed, unpacked
from dist_subspace.placement.optimizer_state import (
    MASTER,
    counted_steps,
    keys_of,
    read_by_name,
    set_step,
    write_by_name,
)


def plain_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the engine, under whatever ZeRO wraps around it."""
    optimizer = engine.optimizer
    plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return plain


def state_keys(engine: Any) -> list[str]:
    """Names of the optimizer's per-element tensors (`exp_avg` ...); empty before the first step."""
    return keys_of(plain_optimizer(engine).state)


def step_count(engine: Any) -> int:
    """How many steps the optimizer has made, as its own counters say; 0 if it keeps none."""
    return counted_steps(plain_optimizer(engine).state.values())


def read_state(engine: Any, trainables: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Collective: `name.master` and `name.<moment>` (`read_by_name`)."""
    with _linked(engine, trainables, rewritten=False) as keys:
        return read_by_name(trainables, keys, lambda parameter, key: _read(engine, parameter, key))


def write_state(engine: Any, trainables: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], steps: int) -> None:
    """Collective: the inverse of `read_state`, after a first step has made the moments. Every rank gives the same tensors.

    Moments that were not stored are zero, and their steps are counted from here on: every step before that checkpoint was
    skipped, or another optimizer made them.
    """
    with _linked(engine, trainables, rewritten=True) as keys:
        stored = write_by_name(trainables, keys, tensors, lambda p, key, value: _write(engine, p, key, value))
    for state in plain_optimizer(engine).state.values():
        set_step(state, steps if stored else 0)


@contextmanager
def _linked(engine: Any, trainables: Mapping[str, nn.Parameter], *, rewritten: bool) -> Iterator[list[str]]:
    """Within the block the moments are numbers, and DeepSpeed finds them from the parameters; gives their names. What is packed
    in 8 bits has another tensor within the block, so DeepSpeed's links are made anew before and after."""
    states = plain_optimizer(engine).state
    packed = has_packed(states)
    try:
        with unpacked(states, rewritten=rewritten):
            for parameter in trainables.values():
                if packed:
                    forget_moments(parameter)
                link_moments(parameter, states)
            yield keys_of(states)
    finally:
        for parameter in trainables.values() if packed else ():
            forget_moments(parameter)


def find_masters(engine: Any) -> None:
    """Local, after `deepspeed.initialize`: find the masters of a 16-bit engine at stage 0, and count its steps from the first.

    `FP16_UnfusedOptimizer` makes a step with zero gradients when it is made, so that the moments exist; Adam's bias correction
    would then begin with the second step, and the run's first update would be a quarter too small.
    """
    link_masters(engine)
    if hasattr(engine.optimizer, "fp32_groups"):
        for state in plain_optimizer(engine).state.values():
            set_step(state, 0)


def _has_own_master(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps a master copy apart from the parameter: at stages 1 and 2 in fragments, at 3 in shards."""
    return is_partitioned(parameter) or has_fragments(parameter)


def _read(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    if not _has_own_master(parameter):
        known = _known_by_optimizer(parameter)
        plain: Tensor = known.detach() if key is None else plain_optimizer(engine).state[known][key]
        return plain
    whole: Tensor | None = (
        safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    )
    if whole is None:
        raise RuntimeError(f"DeepSpeed has no {key or MASTER} for a trained parameter; its ZeRO interface has changed")
    return whole


def _known_by_optimizer(parameter: nn.Parameter) -> Tensor:
    """Where nothing is split: the parameter, or its float32 master in a 16-bit engine."""
    master = linked_master(parameter)
    return parameter if master is None else master


def _write(engine: Any, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
    if key is None:
        _write_parameter(parameter, value)
    if not _has_own_master(parameter):
        known = _known_by_optimizer(parameter)
        (known.data if key is None else plain_optimizer(engine).state[known][key]).copy_(value)
        return
    on_device = value.to(parameter.device)
    if is_partitioned(parameter):
        shard = own_shard(parameter, on_device)
        if key is None:
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_local_optimizer_state(parameter, shard, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, on_device)
    else:
        safe_set_full_optimizer_state(parameter, on_device, key)


def _write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """The copy that the forward reads."""
    with rewritten([parameter]), torch.no_grad():
        parameter.data.copy_(value.view(parameter.shape))
