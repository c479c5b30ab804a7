"""The DeepSpeed engine of a run: its configuration, its optimizer, and one optimizer step over a global batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_subspace.placement.collectives import sum_over_ranks
from dist_subspace.placement.deepspeed.loss_scale import global_norm, loss_scale, missing_scale
from dist_subspace.placement.deepspeed.optimizer_state import settle_masters
from dist_subspace.placement.deepspeed.persistent import keep_trainables_whole
from dist_subspace.subspace import Accumulation, attachment
from dist_subspace.training.data import GlobalBatch, MicroBatch
from dist_subspace.training.loss import forward, summed_loss
from dist_subspace.training.randomness import seed_micro_batch


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Collective: `deepspeed.initialize`, quietly, with the trained parameters kept whole between steps."""
    import deepspeed

    be_quiet()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # some engines make a step of their own, with zero gradients: weights shall not decay in it
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    keep_trainables_whole(engine)
    settle_masters(engine)
    return engine


def be_quiet() -> None:
    """Hold back what libraries say about themselves: DeepSpeed's progress, and torch's notes on functions that DeepSpeed
    calls by their old names. Errors still come through."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


class Stepper:
    """Runs the micro-batches of a global batch and the optimizer step.

    The loss of each micro-batch is its summed loss over the *global* batch's number of targets; the engine divides
    gradients by the number of ranks, so that is multiplied back. A rank without a micro-batch in a round runs the filler
    with weight zero: every rank makes the same calls of the same modules in the same order.
    """

    def __init__(self, engine: Any, device: torch.device, seed: int, world_size: int) -> None:
        self.engine, self.device = engine, device
        attached = attachment(engine.module)
        self.accumulation = attached.accumulation if attached is not None else Accumulation()
        self.seed, self.world_size = seed, world_size
        self._norm: float | None = None

    def accumulate(self, batch: GlobalBatch, stopped: Callable[[], bool] = lambda: False) -> float | None:
        """Collective: forward and backward of every round; returns this rank's summed loss.

        `stopped` is asked between two rounds, by all ranks alike. None if it said so: the gradients of the rounds so far are
        dropped, parameters and optimizer are as they were, and the engine makes no further step.
        """
        losses: list[torch.Tensor] = []
        for number, micro in enumerate(batch.rounds):
            if number and stopped():
                self.engine.zero_grad()
                return None
            # Every rank runs every round, fillers included, and the engine averages over ranks: shares of a step add up to 1.
            self.accumulation.share(loss_scale(self.engine) / len(batch.rounds))
            loss = self._backward(batch.filler if micro is None else micro, micro is not None, batch.targets)
            if micro is not None:
                losses.append(loss)
            if number + 1 < len(batch.rounds):
                self.engine.step()  # counts the micro-step; the optimizer waits for the last round
        return sum(map(float, losses), 0.0)  # read now, when no round is left that would wait for it

    def apply(self, finite: bool) -> bool:
        """Collective: the optimizer step; returns whether it changed anything. DeepSpeed's own optimizers (`overflow`: ZeRO's,
        and a 16-bit engine's, which lowers its loss scale by that) discard gradients that are not finite by themselves; where
        there is a plain one they are dropped here, before it sees them."""
        self._norm, scale = None, loss_scale(self.engine)
        if not hasattr(self.engine.optimizer, "overflow"):
            self._norm = self._plain_norm()
            if not (finite and self._gradients_are_finite()):
                self.engine.zero_grad()
                self.engine.micro_steps += 1  # what engine.step would have counted
                return False
        self.engine.step()
        if self._norm is None:
            self._norm = global_norm(self.engine, scale)
        return finite and bool(self.engine.was_step_applied())

    def _gradients_are_finite(self) -> bool:
        """Local, but alike on all ranks: unsplit gradients have been averaged over them."""
        return all(map(bool, [gradient.isfinite().all() for gradient in self._gradients()]))

    def _plain_norm(self) -> float:
        """Local, but alike on all ranks, before the engine clips: DeepSpeed keeps no norm where its engine is plain."""
        return float(torch.nn.utils.get_total_norm(self._gradients()))

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.engine.module.parameters() if p.grad is not None]

    def prime(self, batch: GlobalBatch, between: Callable[[], object] = lambda: None) -> None:
        """Collective: a step with zero gradients and rate zero, which makes the optimizer's moments exist. `between` is called
        before each round, by all ranks alike."""
        rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0
        for number in range(len(batch.rounds)):
            between()
            self.accumulation.share(0.0)
            self._backward(batch.filler, False, 1)
            if number + 1 < len(batch.rounds):
                self.engine.step()
        self.engine.step()
        for group, rate in zip(self.engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @torch.no_grad()
    def measure(self, batch: GlobalBatch) -> float:
        """Collective: the mean loss of the first round's micro-batches, without dropout. Nothing changes."""
        micro = batch.rounds[0]
        used = batch.filler if micro is None else micro
        self.engine.eval()
        loss = float(summed_loss(forward(self.engine, used, self.device), used.labels))
        self.engine.train()
        total, targets = sum_over_ranks(
            [0.0 if micro is None else loss, 0.0 if micro is None else micro.targets], self.device
        )
        return total / max(1.0, targets)

    def grad_norm(self) -> float | None:
        """Of the last step's global gradient, as it was before clipping, without the loss scale; None before a step."""
        return self._norm

    def _backward(self, micro: MicroBatch, counts: bool, targets: int) -> torch.Tensor:
        """The micro-batch's summed loss, still on its device."""
        seed_micro_batch(self.seed, micro.number)
        loss = summed_loss(forward(self.engine, micro, self.device), micro.labels)
        weight = self.world_size / max(1, targets) if counts else 0.0
        factor: Any = weight * missing_scale(self.engine)
        if counts:  # an infinite loss may have finite gradients, which ZeRO's optimizers would apply: then they are NaN
            factor = factor + 0.0 * loss.detach()
        self.engine.backward(loss * factor, scale_wrt_gas=False)
        return loss.detach()
