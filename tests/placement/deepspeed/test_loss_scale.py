"""The fp16 loss scale. DeepSpeed has no fp16 engine on CPUs, so these are its scalers without an engine around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_subspace.placement.deepspeed.loss_scale import (
    global_norm,
    loss_scale,
    missing_scale,
    restore_scaler,
    scaler_state,
)
from tests.ranks import run_on_ranks


def scaled_engine(dynamic: bool = True, split: bool = True) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, LossScaleConfig

    arguments = {"init_scale": 2.0**16, "scale_window": 2, "min_scale": 1.0}
    if split:
        arguments |= {"delayed_shift": 2, "consecutive_hysteresis": False}
        optimizer = SimpleNamespace(loss_scaler=CreateLossScaler(torch.half, 128.0, dynamic, arguments))
    else:
        optimizer = SimpleNamespace(loss_scale_config=LossScaleConfig(torch.half, dynamic, 128.0, arguments))
    return SimpleNamespace(optimizer=optimizer)


def scales(engine: Any, overflows: list[bool]) -> list[float]:
    found = []
    for overflow in overflows:
        engine.optimizer.loss_scaler.update_scale(overflow)
        found.append(float(engine.optimizer.loss_scaler.loss_scale))
    return found


def scales_go_on(before: list[bool], after: list[bool]) -> bool:
    first, second = scaled_engine(), scaled_engine()
    scales(first, before)
    state = scaler_state(first)
    scales(second, [False])  # the step that makes the moments
    restore_scaler(second, state)
    return scaler_state(second) == state and scales(second, after) == scales(first, after)


def test_a_dynamic_loss_scale_goes_on_where_it_stood() -> None:
    cases = [[False] * 7, [True, True, True], [True, False, False, False, True], [True]]
    for before in cases:
        assert run_on_ranks(1, scales_go_on, before, [True, False, False, False, True]) == [True]


def test_an_unsplit_optimizers_loss_scale_is_put_back_too() -> None:
    first, second = scaled_engine(split=False), scaled_engine(split=False)
    first.optimizer.loss_scale_config.cur_scale, first.optimizer.loss_scale_config.cur_iter = 4.0, 9
    restore_scaler(second, scaler_state(first))
    assert scaler_state(second) == {"cur_scale": 4.0, "cur_iter": 9, "last_overflow_iter": -1}


def test_a_fixed_loss_scale_is_the_configurations() -> None:
    for split in (True, False):
        engine = scaled_engine(dynamic=False, split=split)
        assert scaler_state(engine) == {}
        restore_scaler(engine, scaler_state(scaled_engine()))
        kept = engine.optimizer.loss_scaler if split else engine.optimizer.loss_scale_config
        assert kept.cur_scale == 128.0
    assert scaler_state(SimpleNamespace(optimizer=SimpleNamespace())) == {}


def unsplit_engine(scale: float) -> tuple[Any, torch.nn.Parameter, torch.nn.Parameter]:
    """DeepSpeed's own optimizer of an fp16 engine at stage 0, with a plain gradient step inside; and what it trains."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    held = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float16))
    optimizer = FP16_UnfusedOptimizer(torch.optim.SGD([held], lr=0.25), static_loss_scale=scale, verbose=False)
    engine = SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: True)
    engine.get_global_grad_norm = lambda: optimizer._global_grad_norm
    return engine, held, optimizer.fp32_groups[0][0]


def an_unsplit_step(scale: float) -> dict[str, Any]:
    from dist_subspace.placement.deepspeed.process_group import ensure_process_group

    ensure_process_group()
    engine, held, master = unsplit_engine(scale)
    ((held.float() ** 2).sum() / 2 * missing_scale(engine)).backward()
    engine.optimizer.step()
    return {
        "scale": loss_scale(engine),
        "norm": global_norm(engine, loss_scale(engine)),
        "master": master.tolist(),
        "held": held.tolist(),
    }


@pytest.mark.parametrize("scale", [1.0, 128.0])
def test_an_unsplit_fp16_step_is_the_gradients_whatever_the_loss_scale(scale: float) -> None:
    """Of w² / 2 the gradient is w: with a rate of 1/4 three quarters of w are left, and the norm of (3, -4) is 5."""
    (found,) = run_on_ranks(1, an_unsplit_step, scale)
    assert found == {"scale": scale, "norm": 5.0, "master": [2.25, -3.0], "held": [2.25, -3.0]}
