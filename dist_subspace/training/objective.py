"""What a run minimises: the one question that the loop asks of its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_subspace.placement.protocol import Engine
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import micro_batch_loss
from dist_subspace.training.preferences.rewards import RewardSums


def never() -> bool:
    return False


class Objective(Protocol):
    """The loss of micro-batches as a sum over their terms (`MicroBatch.terms`), of which the loop takes the global mean."""

    def begin(
        self,
        model: nn.Module | Engine,
        rounds: Sequence[MicroBatch | None],
        filler: MicroBatch,
        terms: int,
        chosen_tokens: int,
        stopped: Callable[[], bool] = never,
    ) -> bool:
        """Collective: what must be known of a whole global batch, or of all held-out samples, before the loss of a part of it.

        Arguments:
            rounds: this rank's micro-batches; None where it idles, and runs the filler.
            terms, chosen_tokens: of all ranks together, as a `GlobalBatch` has them.
            stopped: asked between two rounds, by all ranks alike.

        Returns:
            Whether it was done: False where `stopped` said so.
        """

    def loss(self, model: nn.Module | Engine, batch: MicroBatch, counts: bool) -> Tensor:
        """Collective where parameters are split: the sum over the micro-batch's terms, float32.

        Arguments:
            counts: whether its figures do, which those of a filler do not.
        """

    def take(self) -> RewardSums:
        """Local: the sums behind this rank's figures since they were taken last."""


class Likelihood:
    """sft: the cross-entropy of the targets."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(
        self,
        model: nn.Module | Engine,
        rounds: Sequence[MicroBatch | None],
        filler: MicroBatch,
        terms: int,
        chosen_tokens: int,
        stopped: Callable[[], bool] = never,
    ) -> bool:
        return True

    def loss(self, model: nn.Module | Engine, batch: MicroBatch, counts: bool) -> Tensor:
        return micro_batch_loss(model, batch, self.device)

    def take(self) -> RewardSums:
        return RewardSums()
