"""Optimizer state by parameter name: read and written whole, the same at every ZeRO stage and number of ranks.

Uses DeepSpeed's public `safe_get_full_*` and `safe_set_*` functions (deepspeed 0.19.8) where ZeRO splits the state, and the
plain optimizer's own where nothing does. Four things are minded: the moments exist only after a first step; setting a
master copy does not refresh the parameter; Adam's step counters lie in the values of `optimizer.state`, under ZeRO-3 not
under the keys that `param_groups` shows; and ZeRO-3's `safe_set_full_*` fail where the ranks do not divide the parameter
(they cut the last shard out of the unpadded whole), so the rank's own shard is cut here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import any_rank, max_over_ranks
from dist_subspace.placement.deepspeed.eight_bit import is_scale, lengthened, shortened, unpacked
from dist_subspace.placement.deepspeed.fragments import link_moments, master_fragments, optimized_tensor
from dist_subspace.placement.deepspeed.masters import link_masters, linked_master
from dist_subspace.placement.deepspeed.shards import full_shape, is_partitioned, own_shard, places, rewritten

MASTER = "master"


def plain_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the engine, under whatever ZeRO wraps around it."""
    optimizer = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def state_keys(engine: Any) -> list[str]:
    """Names of the optimizer's per-element tensors (`exp_avg` ...); empty before the first step."""
    for state in plain_optimizer(engine).state.values():
        return sorted(_moment_keys(state))
    return []


def step_count(engine: Any) -> int:
    """How many steps the optimizer has made, as its own counters say; 0 if it keeps none."""
    counts = [int(s["step"]) for s in plain_optimizer(engine).state.values() if "step" in s]
    return max(counts, default=0)


def read_state(engine: Any, trainables: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Collective: `name.master` and `name.<moment>`, whole, float32, on the CPU, on every rank; of moments in 8 bits the
    magnitudes of their blocks too (eight_bit.py)."""
    states = plain_optimizer(engine).state
    tensors: dict[str, Tensor] = {}
    with unpacked(states, trainables.values(), rewritten=False):
        keys = state_keys(engine)
        for name, parameter in trainables.items():
            link_moments(parameter, states)
            tensors[f"{name}.{MASTER}"] = _copy(_read(engine, parameter, None))
            for key in keys:
                whole = _copy(_read(engine, parameter, key))
                tensors |= shortened(f"{name}.{key}", whole) if is_scale(key) else {f"{name}.{key}": whole}
    return tensors


def write_state(engine: Any, trainables: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], steps: int) -> None:
    """Collective: the inverse of `read_state`, after a first step has made the moments. Every rank gives the same tensors.

    Moments that were not stored are zero, and their steps are counted from here on: every step before that checkpoint was
    skipped, or another optimizer made them.
    """
    states = plain_optimizer(engine).state
    with unpacked(states, trainables.values(), rewritten=True):
        keys = state_keys(engine)
        if keys and not any(f"{name}.{key}" in tensors for name in trainables for key in keys):
            steps = 0
        for name, parameter in trainables.items():
            link_moments(parameter, states)
            master = tensors[f"{name}.{MASTER}"]
            _write_parameter(parameter, master)
            _write(engine, parameter, None, master)
            for key in keys:
                _write(engine, parameter, key, _stored(f"{name}.{key}", tensors, master))
    for state in states.values():
        if "step" in state:
            _set_step(state, steps)


def _stored(name: str, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    if is_scale(name.rpartition(".")[2]):
        return lengthened(name, tensors, like)
    return tensors[name] if name in tensors else torch.zeros_like(like)


def settle_masters(engine: Any) -> None:
    """Local, after `deepspeed.initialize`: find the masters of a 16-bit engine at stage 0, and count its steps from the first.

    `FP16_UnfusedOptimizer` makes a step with zero gradients when it is made, so that the moments exist; Adam's bias correction
    would then begin with the second step, and the run's first update would be a quarter too small.
    """
    link_masters(engine)
    if hasattr(engine.optimizer, "fp32_groups"):
        for state in plain_optimizer(engine).state.values():
            if "step" in state:
                _set_step(state, 0)


def _is_split(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps a master copy apart from the parameter (`_hp_mapping` at stages 1 and 2, `ds_id` at 3)."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def _read(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    if not _is_split(parameter):
        known = _known_by_optimizer(parameter)
        return known.detach() if key is None else plain_optimizer(engine).state[known][key]
    found = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    if found is None:
        raise RuntimeError(f"DeepSpeed has no {key or MASTER} for a trained parameter; its ZeRO interface has changed")
    return found


def _known_by_optimizer(parameter: nn.Parameter) -> Tensor:
    """Where nothing is split: the parameter, or its float32 master in a 16-bit engine."""
    master = linked_master(parameter)
    return parameter if master is None else master


def _write(engine: Any, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
    if not _is_split(parameter):
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


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


# Edits in the middle of training, by whoever has no engine at hand: another loop's optimizer is known by its first step.

_STEPPED: WeakSet[torch.optim.Optimizer] = WeakSet()


def watch_optimizers() -> None:
    """Local: from now on remember (weakly) every optimizer that makes a step, DeepSpeed's inner ones among them."""
    if not _WATCHING:
        _WATCHING.append(register_optimizer_step_post_hook(lambda optimizer, args, kwargs: _STEPPED.add(optimizer)))


_WATCHING: list[Any] = []


class Edit(Protocol):
    """Write `value` where `where` is true (both broadcast to the parameter's shape); with `moments`, these become zero there."""

    @property
    def parameter(self) -> nn.Parameter: ...

    @property
    def where(self) -> Tensor: ...

    @property
    def value(self) -> Tensor | float: ...

    @property
    def moments(self) -> bool: ...


def apply_edits(edits: Iterable[Edit]) -> None:
    """Local, alike on every rank: write each edit in place, at every ZeRO stage, wherever this rank holds a part of it: the
    parameter, its shard, its fp32 master, the optimizer's moments. Moments that do not exist yet will begin at zero."""
    with torch.no_grad():
        for edit in edits:
            shape = full_shape(edit.parameter)
            where = edit.where.expand(shape).reshape(-1)
            value = edit.value.expand(shape).reshape(-1) if isinstance(edit.value, Tensor) else edit.value
            for held, start in places(edit.parameter):
                _write_where(held, start, where, value)
            _edit_master(edit.parameter, where, value)
            if edit.moments:
                _clear_moments(edit.parameter, where)


def check_editable(parameter: nn.Parameter) -> None:
    """Local: refuse an optimizer that keeps a master copy where nobody else finds it, once it has made a step.

    Raises:
        UsageError: a 16-bit parameter that is not split and that no optimizer knows (DeepSpeed's 16-bit engine at stage 0,
            unless `link_masters` was called).
    """
    if parameter.dtype == torch.float32 or is_partitioned(parameter) or hasattr(parameter, "_hp_mapping"):
        return
    if linked_master(parameter) is not None:
        return
    if not any(parameter in optimizer.state for optimizer in _STEPPED):
        raise UsageError(
            f"the optimizer keeps float32 copies of {str(parameter.dtype).removeprefix('torch.')} parameters where a method's "
            "schedule cannot reach them; accepted: a ZeRO stage from 1 on, or an engine without bf16 and fp16"
        )


def _edit_master(parameter: nn.Parameter, where: Tensor, value: Tensor | float) -> None:
    """Where nothing is split, the parameter is its own master."""
    if not is_partitioned(parameter):
        fragments, start = master_fragments(parameter)
        if fragments:
            _write_where(fragments[None], start, where, value)
    elif optimized_tensor(parameter) is not None:
        master = safe_get_local_fp32_param(parameter).clone()
        _write_where(master, places(parameter)[0][1], where, value)
        safe_set_local_fp32_param(parameter, master)


def _clear_moments(parameter: nn.Parameter, where: Tensor) -> None:
    if hasattr(parameter, "_hp_mapping"):
        for optimizer in _STEPPED:
            link_moments(parameter, optimizer.state)
        fragments, start = master_fragments(parameter)
        for moment in (fragment for key, fragment in fragments.items() if key is not None):
            _write_where(moment, start, where, 0.0)
        return
    state = _optimizer_state(parameter)
    for key in _moment_keys(state):
        if is_partitioned(parameter):
            moment = safe_get_local_optimizer_state(parameter, key).clone()
            _write_where(moment, places(parameter)[0][1], where, 0.0)
            safe_set_local_optimizer_state(parameter, moment, key)
        else:
            _write_where(state[key].view(-1), 0, where, _zero_of(state, key))


def _write_where(held: Tensor, start: int, where: Tensor, value: Tensor | float) -> None:
    """Into a flat tensor whose first element is number `start` of the whole; padding lies beyond the whole."""
    length = min(held.numel(), where.numel() - start)
    if length <= 0:
        return
    own, mask = held[:length], where[start : start + length].to(held.device)
    if isinstance(value, Tensor):
        own.copy_(torch.where(mask, value[start : start + length].to(own), own))
    else:
        own.masked_fill_(mask, value)


def _optimizer_state(parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimizer keeps for the parameter, or for the flat tensor that it is a piece of; empty where it is not known.
    A fragment is a view, so it lies in the memory of the tensor that the optimizer knows it by."""
    optimized = optimized_tensor(parameter)
    if optimized is None:
        return {}
    for optimizer in _STEPPED:
        if optimized in optimizer.state:
            return optimizer.state[optimized]
    if optimized is parameter:
        return {}
    memory = optimized.untyped_storage().data_ptr()
    states = (item for optimizer in _STEPPED for item in optimizer.state.items())
    return next((state for key, state in states if key.untyped_storage().data_ptr() == memory), {})


def _moment_keys(state: Mapping[str, Any]) -> list[str]:
    """Per-element tensors; an 8-bit optimizer's tables and block scales are none."""
    tables = ("qmap", "absmax", "new_")
    return [k for k, v in state.items() if isinstance(v, Tensor) and v.numel() > 1 and not k.startswith(tables)]


def _zero_of(state: Mapping[str, Any], key: str) -> float:
    """Zero as the moment holds it: an 8-bit optimizer's codes are places in a table (bitsandbytes: `state1`, `qmap1`)."""
    table = state.get(f"qmap{key[-1]}")
    return 0.0 if table is None or state[key].is_floating_point() else int(table.abs().argmin())


# Step counters, on which Adam's bias correction hangs.


def restart_counters(parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> int | None:
    """Collective: let the optimizer count the steps of `parameters` from here on; returns how many it had counted.

    None where that cannot be done: an optimizer without counters, or one that counts them together with some of `others` (a
    ZeRO stage from 1 on counts a parameter group as one). Then nothing is changed.
    """
    own, rest = _counted(parameters), {id(state) for state in _counted(others)}
    if any_rank(any(id(state) in rest for state in own)):
        return None
    count = int(max_over_ranks(max((int(state["step"]) for state in own), default=0)))
    set_counters(parameters, 0)
    return count or None


def set_counters(parameters: Sequence[nn.Parameter], steps: int) -> None:
    """Local, alike on every rank: the optimizer has made this many steps with these parameters."""
    for state in _counted(parameters):
        _set_step(state, steps)


def _counted(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    states = {id(state): state for state in map(_optimizer_state, parameters) if "step" in state}
    return list(states.values())


def _set_step(state: dict[str, Any], steps: int) -> None:
    state["step"] = state["step"].fill_(steps) if isinstance(state["step"], Tensor) else steps
