"""An engine in plain torch for one process (`Engine`): a backward is torch's, a step is the optimizer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.placement.eight_bit import unpacked
from dist_subspace.placement.gradients import are_finite, gradients_of, total_norm
from dist_subspace.placement.optimizer_state import counted_steps, keys_of, read_by_name, set_step, write_by_name


class WholeEngine:
    """Trains the model as ZeRO stage 0 does on one rank, to the bit. There is no loss scale: trained parameters are float32."""

    loss_scale = 1.0
    has_loss_scale = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """max_grad_norm: of the gradient of a step; 0 for no clipping."""
        self.module, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm
        self.grad_norm: float | None = None

    @property
    def training(self) -> bool:
        return self.module.training

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def train(self, mode: bool = True) -> object:
        return self.module.train(mode)

    def eval(self) -> object:
        return self.module.eval()

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    @rates.setter
    def rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def next_micro_batch(self) -> None:
        """Gradients add up by themselves."""

    def step(self, finite: bool) -> bool:
        self._complete_gradients()
        gradients = gradients_of(self.module)
        self.grad_norm = total_norm(gradients)
        applied = finite and are_finite(gradients)
        if applied:
            if self.max_grad_norm > 0:
                _clip(gradients, self.max_grad_norm)
            self.optimizer.step()
        self.drop_gradients()
        return applied

    def make_moments(self) -> None:
        self._complete_gradients()
        self.optimizer.step()
        self.drop_gradients()

    def _complete_gradients(self) -> None:
        """A parameter that no micro-batch used moves by its momentum and decays, as it does where ranks share gradients."""
        for parameter in self.module.parameters():
            if parameter.requires_grad and parameter.grad is None and parameter.numel():
                parameter.grad = torch.zeros_like(parameter)

    def drop_gradients(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def step_count(self) -> int:
        return counted_steps(self.optimizer.state.values())

    def read_state(self, trainables: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        with unpacked(self.optimizer.state, rewritten=False):
            return read_by_name(trainables, keys_of(self.optimizer.state), self._held)

    def write_state(self, trainables: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], steps: int) -> None:
        with unpacked(self.optimizer.state, rewritten=True):
            stored = write_by_name(trainables, keys_of(self.optimizer.state), tensors, self._write)
        for state in self.optimizer.state.values():
            set_step(state, steps if stored else 0)

    def _held(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """The parameter, which is its own master, or a moment of it."""
        held: Tensor = parameter.data if key is None else self.optimizer.state[parameter][key]
        return held

    def _write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        held = self._held(parameter, key)
        held.copy_(value.view(held.shape))

    def scaler_state(self) -> dict[str, float]:
        return {}

    def restore_scaler(self, state: Mapping[str, float]) -> None:
        """There is none: a scale that another engine has left in a checkpoint is its own affair."""


def _clip(gradients: Sequence[Tensor], largest: float) -> None:
    """In place, to this norm at most; the arithmetic is that of DeepSpeed's `clip_grad_norm_`, entry for entry."""
    norms = torch.stack([gradient.float().norm(2.0) for gradient in gradients])
    total = norms.pow(2.0).sum().pow(0.5) + 1e-6
    factor = torch.full_like(total, largest) / total  # a number over a tensor would be its reciprocal times the number
    for gradient in gradients:
        gradient.mul_(factor.clamp(max=1.0))
