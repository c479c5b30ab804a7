"""How much of the step's loss one backward stands for: what is added beside the loss (a constraint's penalty) is scaled alike,
and what is read from gradients (a schedule's importance) is freed of it.

A loop that knows says it (`share`). Else the model's own loss tells: the gradient that reaches it is whatever the loop, the
engine and its loss scaler multiplied it by. A loop that makes its loss itself can have that loss tell it (`probe`); one that
says nothing counts as one backward a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.torch_internals import TensorFunction
from dist_subspace.transformers_tables import shifts_labels

IGNORED = -100


class Accumulation:
    """The weight of the running backward, and the sum of weights since `restart`. Local to the rank."""

    def __init__(self) -> None:
        self._share: float | None = None
        self._upstream: Tensor | None = None
        self._total: Tensor | float | None = None
        self.outside = False

    def share(self, weight: float) -> None:
        """Said by a loop before each backward: the weights of a step add up to 1 (times the loss scale) on every rank."""
        self._share = weight
        self._add(weight)

    def reached(self, gradient: Tensor) -> None:
        """Called when a gradient reaches the model's own loss."""
        if self._share is None:
            self._upstream = gradient.detach().float().reshape(())
            self._add(self._upstream)

    def unknown(self) -> None:
        """Called by a forward that makes no loss."""
        self._upstream = None

    @contextmanager
    def heard_outside(self) -> Iterator[None]:
        """Within the block forwards make a loss, or what one is made from, that will be given to `probe`."""
        before, self.outside = self.outside, True
        try:
            yield
        finally:
            self.outside = before

    def probe(self, loss: Tensor, part: float) -> Tensor:
        """The loss, which tells how it is weighted when a gradient reaches it.

        Arguments:
            part: the share of the step that the gradient 1 stands for (a step's micro-batches add up to 1).
        """
        return _Probe.apply(loss, self, part) if loss.requires_grad else loss

    @property
    def weight(self) -> Tensor | float:
        if self._share is not None:
            return self._share
        return 1.0 if self._upstream is None else self._upstream

    @property
    def total(self) -> float:
        """The sum of the weights since `restart`; 1 where nobody said anything. Gradients summed up over the same backwards
        and over all ranks, divided by the sum of the ranks' totals, are those of the step's mean loss."""
        return 1.0 if self._total is None else float(self._total)

    def restart(self) -> None:
        self._total = None

    def _add(self, weight: Tensor | float) -> None:
        self._total = weight if self._total is None else self._total + weight


class _Probe(TensorFunction):
    """The loss, unchanged; notes the gradient that reaches it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, accumulation: Accumulation, part: float) -> Tensor:
        ctx.accumulation, ctx.part = accumulation, part
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.accumulation.reached(g * ctx.part)
        return g, None, None


def watch_loss(model: nn.Module, accumulation: Accumulation) -> None:
    """Let the model's own loss tell how it is weighted (a forward hook on the model)."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if accumulation.outside or not module.training or not torch.is_grad_enabled():
            return None
        if loss is None or loss.dim() != 0 or not loss.requires_grad:
            accumulation.unknown()
            return None
        output["loss"] = _Probe.apply(loss, accumulation, _part(module, kwargs))
        return output

    model.register_forward_hook(hook, with_kwargs=True)


def _part(model: nn.Module, kwargs: Mapping[str, Any]) -> float:
    """transformers' Trainer divides a micro-batch's summed loss by the targets of the whole step (`num_items_in_batch`): its
    mean loss then has this micro-batch's share of the targets."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or labels is None:
        return 1.0
    targets = labels[..., 1:] if shifts_labels(model) else labels
    return float((targets != IGNORED).sum()) / max(1.0, float(items))
