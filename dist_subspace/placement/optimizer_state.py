"""Optimizer state by parameter name: read and written whole, the same at every ZeRO stage and number of ranks.

Uses DeepSpeed's public `safe_get_full_*` and `safe_set_*` functions (deepspeed 0.19.8) where ZeRO splits the state, and the
plain optimizer's own where nothing does. Four things are minded: the moments exist only after a first step; setting a
master copy does not refresh the parameter; Adam's step counters lie in the values of `optimizer.state`, under ZeRO-3 not
under the keys that `param_groups` shows; and ZeRO-3's `safe_set_full_*` fail where the ranks do not divide the parameter
(they cut the last shard out of the unpadded whole), so the rank's own shard is cut here.
"""

from __future__ import annotations

from collections.abc import Mapping
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

from dist_subspace.placement.zero import is_partitioned, own_shard, rewritten

MASTER = "master"


def plain_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the engine, under whatever ZeRO wraps around it."""
    optimizer = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def state_keys(engine: Any) -> list[str]:
    """Names of the optimizer's per-element tensors (`exp_avg` ...); empty before the first step."""
    for state in plain_optimizer(engine).state.values():
        return sorted(key for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1)
    return []


def step_count(engine: Any) -> int:
    """How many steps the optimizer has made, as its own counters say; 0 if it keeps none."""
    counts = [int(s["step"]) for s in plain_optimizer(engine).state.values() if "step" in s]
    return max(counts, default=0)


def read_state(engine: Any, trainables: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Collective: `name.master` and `name.<moment>`, whole, float32, on the CPU, on every rank."""
    keys = state_keys(engine)
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainables.items():
        tensors[f"{name}.{MASTER}"] = _copy(_read(engine, parameter, None))
        for key in keys:
            tensors[f"{name}.{key}"] = _copy(_read(engine, parameter, key))
    return tensors


def write_state(engine: Any, trainables: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], steps: int) -> None:
    """Collective: the inverse of `read_state`, after a first step has made the moments. Every rank gives the same tensors.

    Moments that were not stored are zero: every step before that checkpoint was skipped, and there were none.
    """
    keys = state_keys(engine)
    for name, parameter in trainables.items():
        master = tensors[f"{name}.{MASTER}"]
        _write_parameter(parameter, master)
        _write(engine, parameter, None, master)
        for key in keys:
            stored = tensors.get(f"{name}.{key}")
            _write(engine, parameter, key, torch.zeros_like(master) if stored is None else stored)
    for state in plain_optimizer(engine).state.values():
        if "step" in state:
            state["step"] = state["step"].fill_(steps) if isinstance(state["step"], Tensor) else steps


def _is_split(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps a master copy apart from the parameter (`_hp_mapping` at stages 1 and 2, `ds_id` at 3)."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def _read(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    if not _is_split(parameter):
        return parameter.detach() if key is None else plain_optimizer(engine).state[parameter][key]
    found = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    if found is None:
        raise RuntimeError(f"DeepSpeed has no {key or MASTER} for a trained parameter; its ZeRO interface has changed")
    return found


def _write(engine: Any, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
    if not _is_split(parameter):
        if key is not None:
            plain_optimizer(engine).state[parameter][key].copy_(value)
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
