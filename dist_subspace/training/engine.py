"""One optimizer step over a global batch, whatever engine trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from dist_subspace.placement.collectives import sum_over_ranks
from dist_subspace.placement.protocol import Engine
from dist_subspace.subspace import Accumulation, attachment
from dist_subspace.training.activation_offload import Keep
from dist_subspace.training.data import GlobalBatch, MicroBatch
from dist_subspace.training.objective import Likelihood, Objective
from dist_subspace.training.profile import part
from dist_subspace.training.randomness import seed_micro_batch


class Stepper:
    """Runs the micro-batches of a global batch and the optimizer step.

    The loss of each micro-batch is its summed loss over the *global* batch's number of terms; the engine divides
    gradients by the number of ranks, so that is multiplied back. A rank without a micro-batch in a round runs the filler
    with weight zero: every rank makes the same calls of the same modules in the same order.
    """

    def __init__(
        self,
        engine: Engine,
        device: torch.device,
        seed: int,
        world_size: int,
        keep: Keep = nullcontext,
        objective: Objective | None = None,
    ) -> None:
        """keep: what a forward runs in that a backward follows; objective: what makes the loss; None: the likelihood."""
        self.engine, self.device, self.keep = engine, device, keep
        self.objective = objective or Likelihood(device)
        attached = attachment(engine.module)
        self.accumulation = attached.accumulation if attached is not None else Accumulation()
        self.seed, self.world_size = seed, world_size

    def accumulate(self, batch: GlobalBatch, stopped: Callable[[], bool] = lambda: False) -> float | None:
        """Collective: forward and backward of every round; returns this rank's summed loss.

        `stopped` is asked between two rounds, by all ranks alike. None if it said so: the gradients of the rounds so far are
        dropped, parameters and optimizer are as they were, and the engine makes no further step.
        """
        losses: list[torch.Tensor] = []
        if not self._begin(batch, stopped):
            return None
        for number, micro in enumerate(batch.rounds):
            if number and stopped():
                self.engine.drop_gradients()
                return None
            # Every rank runs every round, fillers included, and the engine averages over ranks: shares of a step add up to 1.
            self.accumulation.share(self.engine.loss_scale / len(batch.rounds))
            loss = self._backward(batch.filler if micro is None else micro, micro is not None, batch.terms)
            if micro is not None:
                losses.append(loss)
            if number + 1 < len(batch.rounds):
                self.engine.next_micro_batch()
        return sum(map(float, losses), 0.0)  # read now, when no round is left that would wait for it

    def prime(self, batch: GlobalBatch, between: Callable[[], object] = lambda: None) -> None:
        """Collective: a step with zero gradients and rate zero, which makes the optimizer's moments exist. `between` is called
        before each round, by all ranks alike."""
        rates = self.engine.rates
        self.engine.rates = [0.0] * len(rates)
        for number in range(len(batch.rounds)):
            between()
            self.accumulation.share(0.0)
            self._backward(batch.filler, False, 1)
            if number + 1 < len(batch.rounds):
                self.engine.next_micro_batch()
        self.engine.make_moments()
        self.engine.rates = rates

    @torch.no_grad()
    def measure(self, batch: GlobalBatch) -> float:
        """Collective: the mean loss of the first round's micro-batches, without dropout. Nothing changes."""
        micro = batch.rounds[0]
        used = batch.filler if micro is None else micro
        self._begin(batch)
        self.engine.eval()
        loss = float(self.objective.loss(self.engine, used, False))
        self.engine.train()
        total, terms = sum_over_ranks(
            [0.0 if micro is None else loss, 0.0 if micro is None else micro.terms], self.device
        )
        return total / max(1.0, terms)

    def _begin(self, batch: GlobalBatch, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Collective: what the objective must know of the whole batch first; False where `stopped` said so."""
        counts = (batch.terms, batch.chosen_tokens)
        return self.objective.begin(self.engine, batch.rounds, batch.filler, *counts, stopped)

    def _backward(self, micro: MicroBatch, counts: bool, terms: int) -> torch.Tensor:
        """The micro-batch's summed loss, still on its device."""
        seed_micro_batch(self.seed, micro.number)
        with self.keep(), part("forward"):
            loss = self.objective.loss(self.engine, micro, counts)
        weight = self.world_size / max(1, terms) if counts else 0.0
        # An infinite loss may have finite gradients, which ZeRO's optimizers would apply: then they are NaN.
        factor = weight + 0.0 * loss.detach() if counts else 0.0
        with part("backward"):
            self.engine.backward(loss * factor)
        return loss.detach()
