"""Float32 masters that a 16-bit engine of DeepSpeed keeps apart where nothing is split (deepspeed 0.19.8,
`runtime/fp16/unfused_optimizer.py`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_MASTER = "_dist_subspace_master"


def link_masters(engine: Any) -> None:
    """Local: let a trained parameter know its float32 master where a 16-bit engine keeps it apart at stage 0.

    There DeepSpeed takes `FP16_UnfusedOptimizer`, for bf16 as for fp16 (`fp32_groups` beside `fp16_groups`), whose inner
    optimizer knows the masters alone. `safe_get_full_*` finds nothing of it.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        return
    for held, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(held, masters, strict=True):
            setattr(parameter, _MASTER, master)


def linked_master(parameter: Any) -> Tensor | None:
    """Local: what `link_masters` found."""
    master: Tensor | None = getattr(parameter, _MASTER, None)
    return master
