"""DeepSpeed's fp16 loss scale: what it is, and where its dynamic scaling stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def loss_scale(engine: Any) -> float:
    """What a loss is multiplied by before backward: DeepSpeed's fp16 scaler's number (`optimizer.loss_scale`), else 1."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def scaler_state(engine: Any) -> dict[str, float]:
    """Local, alike on every rank: where DeepSpeed's dynamic fp16 loss scaling stands; empty where there is none."""
    scaler = _dynamic_scaler(engine)
    return {name: getattr(scaler, name) for name in _SCALING if hasattr(scaler, name)}


def restore_scaler(engine: Any, state: Mapping[str, float]) -> None:
    """Local, alike on every rank: the inverse. A scale that is fixed comes from the configuration, and stays."""
    scaler = _dynamic_scaler(engine)
    for name in _SCALING:
        if name in state and hasattr(scaler, name):
            setattr(scaler, name, state[name])


def _dynamic_scaler(engine: Any) -> Any | None:
    """What counts steps and overflows: at stages 1 to 3 the optimizer's `loss_scaler` (its `dynamic` is False where the scale
    is fixed, or 1), else its `loss_scale_config`, which has no hysteresis. DeepSpeed 0.19 writes them into its own checkpoints
    alone, and a new engine begins at the initial scale."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        return scaler if scaler.dynamic else None
    config = getattr(engine.optimizer, "loss_scale_config", None)
    return config if config is not None and config.dynamic_loss_scale else None
