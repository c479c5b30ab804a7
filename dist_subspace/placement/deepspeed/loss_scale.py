"""DeepSpeed's fp16 loss scale: what it is, and where its dynamic scaling stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def loss_scale(engine: Any) -> float:
    """What a loss is multiplied by before backward: DeepSpeed's fp16 scaler's number (`optimizer.loss_scale`), else 1."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def missing_scale(engine: Any) -> float:
    """What a loss must be multiplied by before `engine.backward`, because DeepSpeed does not: its engine scales for ZeRO's
    optimizers alone, while the unsplit fp16 optimizer (`fp32_groups`) divides by the scale all the same."""
    return loss_scale(engine) if hasattr(engine.optimizer, "fp32_groups") else 1.0


def global_norm(engine: Any, scale: float) -> float | None:
    """Local, alike on every rank: the norm of the last step's gradient before clipping, as DeepSpeed's optimizer kept it
    (`get_global_grad_norm`); None where it kept none.

    Arguments:
        scale: the loss scale before that step. The unsplit 16-bit optimizer (`fp32_groups`) leaves it in the norm.
    """
    norm = engine.get_global_grad_norm()
    if norm is None:
        return None
    return float(norm) / scale if hasattr(engine.optimizer, "fp32_groups") else float(norm)


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
