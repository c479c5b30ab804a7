"""Optimizer state by parameter name, as a checkpoint holds it, the same whoever trains: `NAME.master` and `NAME.<moment>`, whole,
float32; of moments in 8 bits the magnitudes of their blocks too (eight_bit.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.placement.eight_bit import is_scale, lengthened, shortened

MASTER = "master"
States = Mapping[Tensor, dict[str, Any]]  # of a plain optimizer, by the tensors that it was given


def moment_keys(state: Mapping[str, Any]) -> list[str]:
    """Per-element tensors (`exp_avg` ...); an 8-bit optimizer's tables and block scales are none."""
    tables = ("qmap", "absmax", "new_")
    return [k for k, v in state.items() if isinstance(v, Tensor) and v.numel() > 1 and not k.startswith(tables)]


def keys_of(states: States) -> list[str]:
    """Names of the optimizer's per-element tensors; empty before the first step."""
    for state in states.values():
        return sorted(moment_keys(state))
    return []


def zero_of(state: Mapping[str, Any], key: str) -> float:
    """Zero as the moment holds it: an 8-bit optimizer's codes are places in a table (bitsandbytes: `state1`, `qmap1`)."""
    table = state.get(f"qmap{key[-1]}")
    return 0.0 if table is None or state[key].is_floating_point() else int(table.abs().argmin())


def counted_steps(states: Iterable[Mapping[str, Any]]) -> int:
    """How many steps the optimizer has made, as its own counters say; 0 if it keeps none."""
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def set_step(state: dict[str, Any], steps: int) -> None:
    """Where the optimizer counts steps in this entry, let it count on from here."""
    if "step" in state:
        state["step"] = state["step"].fill_(steps) if isinstance(state["step"], Tensor) else steps


def read_by_name(
    trainables: Mapping[str, nn.Parameter], keys: list[str], read: Callable[[nn.Parameter, str | None], Tensor]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint. `read(parameter, key)` is a moment, or the master (None), whole."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainables.items():
        tensors[f"{name}.{MASTER}"] = _copy(read(parameter, None))
        for key in keys:
            whole = _copy(read(parameter, key))
            tensors |= shortened(f"{name}.{key}", whole) if is_scale(key) else {f"{name}.{key}": whole}
    return tensors


def write_by_name(
    trainables: Mapping[str, nn.Parameter],
    keys: list[str],
    tensors: Mapping[str, Tensor],
    write: Callable[[nn.Parameter, str | None, Tensor], None],
) -> bool:
    """The inverse. Moments that were not stored are zero; returns whether some were stored."""
    for name, parameter in trainables.items():
        master = tensors[f"{name}.{MASTER}"]
        write(parameter, None, master)
        for key in keys:
            write(parameter, key, _stored(f"{name}.{key}", tensors, master))
    return not keys or any(f"{name}.{key}" in tensors for name in trainables for key in keys)


def _stored(name: str, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    if is_scale(name.rpartition(".")[2]):
        return lengthened(name, tensors, like)
    return tensors[name] if name in tensors else torch.zeros_like(like)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
