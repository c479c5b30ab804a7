"""DeepSpeed's engine as this package drives it (`Engine`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.late_compile import compiled_when_called
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed import optimizer_state
from dist_subspace.placement.deepspeed.embeddings import spare_frozen_embeddings
from dist_subspace.placement.deepspeed.expert_lists import check_expert_lists
from dist_subspace.placement.deepspeed.in_place import take_apart
from dist_subspace.placement.deepspeed.loss_scale import (
    global_norm,
    loss_scale,
    missing_scale,
    restore_scaler,
    scaler_state,
)
from dist_subspace.placement.deepspeed.persistent import keep_trainables_whole
from dist_subspace.placement.deepspeed.quiet import be_quiet
from dist_subspace.placement.gradients import are_finite, gradients_of, total_norm


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Collective: `deepspeed.initialize`, quietly, with the trained parameters kept whole between steps.

    Raises:
        UsageError: for trained parameters that the configuration would add up wrongly.
    """
    import deepspeed

    be_quiet()
    check_expert_lists(model, config, world().size)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # some engines make a step of their own, with zero gradients: weights shall not decay in it
    with compiled_when_called():  # it imports optimizers that nobody has asked for
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _settle(engine)
    optimizer_state.find_masters(engine)
    return engine


def _settle(engine: Any) -> None:
    """Which weights stay whole between forwards, and which are never gathered."""
    keep_trainables_whole(engine)
    spare_frozen_embeddings(engine.module)
    take_apart(engine.module)


def gather_when_called(model: nn.Module, config: Mapping[str, Any]) -> Callable[[], None]:
    """Collective: `deepspeed.initialize` of a split model that nothing trains: its weights are gathered when its modules are
    called. Returns what ends that.

    Arguments:
        config: of ZeRO stage 3.
    """
    import deepspeed

    be_quiet()
    section = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config=dict(config) | {"zero_optimization": section})
    _settle(engine)
    engine.eval()
    return lambda: engine.destroy()


class DeepSpeedEngine:
    """What `initialize` returned, at any ZeRO stage and in any type; `deepspeed` is the library's own object."""

    def __init__(self, engine: Any) -> None:
        self.deepspeed = engine
        self._norm: float | None = None

    @property
    def module(self) -> nn.Module:
        model: nn.Module = self.deepspeed.module
        return model

    @property
    def training(self) -> bool:
        return bool(self.deepspeed.training)

    def __call__(self, **inputs: Any) -> Any:
        return self.deepspeed(**inputs)

    def train(self, mode: bool = True) -> object:
        return self.deepspeed.train(mode)

    def eval(self) -> object:
        return self.deepspeed.eval()

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.deepspeed.optimizer.param_groups]

    @rates.setter
    def rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.deepspeed.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @property
    def loss_scale(self) -> float:
        return loss_scale(self.deepspeed)

    @property
    def has_loss_scale(self) -> bool:
        return bool(self.deepspeed.fp16_enabled())

    def backward(self, loss: Tensor) -> None:
        missing = missing_scale(self.deepspeed)
        self.deepspeed.backward(loss if missing == 1.0 else loss * missing, scale_wrt_gas=False)

    def next_micro_batch(self) -> None:
        """DeepSpeed counts the micro-step, and its optimizer waits for the last one."""
        self.deepspeed.step()

    def step(self, finite: bool) -> bool:
        """DeepSpeed's own optimizers (`overflow`: ZeRO's, and a 16-bit engine's, which lowers its loss scale by that) discard
        gradients that are not finite by themselves; where there is a plain one they are dropped here, before it sees them."""
        self._norm, scale = None, self.loss_scale
        if not hasattr(self.deepspeed.optimizer, "overflow"):
            gradients = gradients_of(self.module)  # averaged over the ranks by now, and so alike on all of them
            self._norm = total_norm(gradients)
            if not (finite and are_finite(gradients)):
                self.drop_gradients()
                self.deepspeed.micro_steps += 1  # what engine.step would have counted
                return False
        self.deepspeed.step()
        if self._norm is None:
            self._norm = global_norm(self.deepspeed, scale)
        return finite and bool(self.deepspeed.was_step_applied())

    def make_moments(self) -> None:
        self.deepspeed.step()

    def drop_gradients(self) -> None:
        self.deepspeed.zero_grad()

    @property
    def grad_norm(self) -> float | None:
        return self._norm

    def step_count(self) -> int:
        return optimizer_state.step_count(self.deepspeed)

    def read_state(self, trainables: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return optimizer_state.read_state(self.deepspeed, trainables)

    def write_state(self, trainables: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], steps: int) -> None:
        optimizer_state.write_state(self.deepspeed, trainables, tensors, steps)

    def scaler_state(self) -> dict[str, float]:
        return scaler_state(self.deepspeed)

    def restore_scaler(self, state: Mapping[str, float]) -> None:
        restore_scaler(self.deepspeed, state)
