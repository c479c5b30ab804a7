"""dpo, kto and orpo: log probabilities of the model and of its reference, TRL's loss of them, and the figures.

The reference is asked before the model is, so that a backward follows the forward that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dist_subspace.config.preference import PreferenceArguments
from dist_subspace.placement.collectives import sum_over_ranks, world
from dist_subspace.placement.protocol import Engine
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.data.micro_batch import Preferences
from dist_subspace.training.loss import to_device
from dist_subspace.training.objective import never
from dist_subspace.training.preferences.logps import measured_logps, token_logps
from dist_subspace.training.preferences.reference import Reference
from dist_subspace.training.preferences.rewards import RewardSums, vector
from dist_subspace.training.preferences.trl_losses import needs_kl, odds_ratio, paired_loss, unpaired_loss


class OfPreferences:
    """What the three have in common."""

    def __init__(self, arguments: PreferenceArguments, device: torch.device, reference: Reference) -> None:
        self.arguments, self.device, self.reference = arguments, device, reference
        self._sums: list[Tensor] = []
        self._global = RewardSums()  # what belongs to a global batch and to no micro-batch of it

    def begin(
        self,
        model: nn.Module | Engine,
        rounds: Sequence[MicroBatch | None],
        filler: MicroBatch,
        terms: int,
        chosen_tokens: int,
        stopped: Callable[[], bool] = never,
    ) -> bool:
        self._sums = []  # of a step that was interrupted
        return True

    def loss(self, model: nn.Module | Engine, batch: MicroBatch, counts: bool) -> Tensor:
        loss, balance, sums = self._made(model, batch, _said(batch))
        if counts:
            self._sums.append(sums)
        return loss if balance is None else loss + balance

    def take(self) -> RewardSums:
        own = [RewardSums.of(sums.tolist()) for sums in self._sums]
        taken = RewardSums.summed([self._global, *own])
        self._sums, self._global = [], RewardSums()
        return taken

    def _of_reference(self, model: nn.Module | Engine, batch: MicroBatch) -> Tensor:
        with self.reference.asked():
            return measured_logps(model, batch, self.device)

    def _made(
        self, model: nn.Module | Engine, batch: MicroBatch, said: Preferences
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(loss as a sum over the terms, what routers add, the figures' sums)."""
        raise NotImplementedError


class Dpo(OfPreferences):
    """Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, and the losses that TRL has beside it."""

    def _made(
        self, model: nn.Module | Engine, batch: MicroBatch, said: Preferences
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        reference = self._of_reference(model, batch)
        logps, balance = token_logps(model, batch, self.device)
        completions = to_device(said.completions, logps.device)
        loss = paired_loss(self.arguments, logps, completions, reference) * batch.terms
        answers = logps.detach().sum(1)
        rewards = self.arguments.beta * (answers - reference)
        return loss, balance, vector(rewards, answers, _first_half(answers), paired=True)


class Orpo(OfPreferences):
    """Hong et al. 2024, https://arxiv.org/abs/2403.07691: the chosen texts' loss, less beta times the log odds ratio. No base."""

    def __init__(self, arguments: PreferenceArguments, device: torch.device, reference: Reference) -> None:
        super().__init__(arguments, device, reference)
        self._pairs_a_token = 1.0

    def begin(
        self,
        model: nn.Module | Engine,
        rounds: Sequence[MicroBatch | None],
        filler: MicroBatch,
        terms: int,
        chosen_tokens: int,
        stopped: Callable[[], bool] = never,
    ) -> bool:
        """The texts' loss is a mean over their tokens, the odds ratio one over the pairs: so much a token weighs among pairs."""
        self._pairs_a_token = terms / max(1, chosen_tokens)
        return super().begin(model, rounds, filler, terms, chosen_tokens, stopped)

    def _made(
        self, model: nn.Module | Engine, batch: MicroBatch, said: Preferences
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        logps, balance = token_logps(model, batch, self.device)
        of_answers = to_device(said.completions[:, 1:], logps.device)
        means = (logps * of_answers).sum(1) / of_answers.sum(1)
        chosen, rejected = means.chunk(2)
        nll = -logps[: len(chosen)].sum()
        loss = self._pairs_a_token * nll - odds_ratio(self.arguments, chosen, rejected).sum()
        rewards, half = self.arguments.beta * means, _first_half(means)
        return loss, balance, vector(rewards, means, half, paired=True, nll=nll, nll_count=said.chosen_tokens)


class Kto(OfPreferences):
    """Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306."""

    def __init__(self, arguments: PreferenceArguments, device: torch.device, reference: Reference) -> None:
        super().__init__(arguments, device, reference)
        self._kl = torch.zeros(1, device=device)

    def begin(
        self,
        model: nn.Module | Engine,
        rounds: Sequence[MicroBatch | None],
        filler: MicroBatch,
        terms: int,
        chosen_tokens: int,
        stopped: Callable[[], bool] = never,
    ) -> bool:
        """The distance from the reference, on every prompt of the global batch before another one's answer: one number for all of
        its micro-batches, whichever ranks have them."""
        super().begin(model, rounds, filler, terms, chosen_tokens, stopped)
        if not needs_kl(self.arguments):
            return True
        own = []
        for batch in rounds:
            if stopped():
                return False
            other = _said(filler if batch is None else batch).mismatched
            assert other is not None  # answers come with it
            further = measured_logps(model, other, self.device) - self._of_reference(model, other)
            own += [further.sum()] if batch is not None else []
        (total,) = sum_over_ranks([sum(map(float, own), 0.0)], self.device)
        kl = total / max(1, terms)
        self._kl = torch.full((1,), kl, device=self.device)
        self._global = RewardSums(kl=max(0.0, kl) / world().size, kl_count=1.0 / world().size)
        return True

    def _made(
        self, model: nn.Module | Engine, batch: MicroBatch, said: Preferences
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        assert said.desirable is not None  # single answers say it
        reference = self._of_reference(model, batch)
        logps, balance = token_logps(model, batch, self.device)
        completions, desirable = (to_device(t, logps.device) for t in (said.completions, said.desirable))
        loss = unpaired_loss(self.arguments, logps, completions, reference, desirable, self._kl) * batch.terms
        answers = logps.detach().sum(1)
        rewards = self.arguments.beta * (answers - reference)
        return loss, balance, vector(rewards, answers, desirable, paired=False)


def _said(batch: MicroBatch) -> Preferences:
    assert batch.preferences is not None  # the objective has chosen what collates
    return batch.preferences


def _first_half(answers: Tensor) -> Tensor:
    return torch.arange(len(answers), device=answers.device) < len(answers) // 2
