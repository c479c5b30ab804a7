"""The figures of preferences, by TRL's names, as sums that add up over micro-batches, ranks and steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardSums:
    """Sums over answers. A reward is beta times how much likelier an answer is than under the base (orpo: its mean log
    probability)."""

    chosen: float = 0.0
    rejected: float = 0.0
    chosen_logps: float = 0.0
    rejected_logps: float = 0.0
    chosen_count: float = 0.0
    rejected_count: float = 0.0
    accurate: float = 0.0
    """Pairs of which the chosen answer has the higher reward."""
    pairs: float = 0.0
    nll: float = 0.0
    """Of the predicted tokens of chosen texts (orpo)."""
    nll_count: float = 0.0
    kl: float = 0.0
    """KTO's distance from the base, a term a step."""
    kl_count: float = 0.0

    @classmethod
    def summed(cls, several: Iterable[RewardSums]) -> RewardSums:
        columns = zip(*map(astuple, several), strict=True)
        return cls(*map(sum, columns))

    @classmethod
    def of(cls, numbers: Sequence[float]) -> RewardSums:
        """From what `numbers` gave."""
        return cls(*numbers)

    def numbers(self) -> list[float]:
        return list(astuple(self))

    def figures(self) -> dict[str, float]:
        """The means that there are, by TRL's names."""
        found = {
            "rewards/chosen": (self.chosen, self.chosen_count),
            "rewards/rejected": (self.rejected, self.rejected_count),
            "rewards/accuracies": (self.accurate, self.pairs),
            "logps/chosen": (self.chosen_logps, self.chosen_count),
            "logps/rejected": (self.rejected_logps, self.rejected_count),
            "nll_loss": (self.nll, self.nll_count),
            "kl": (self.kl, self.kl_count),
        }
        means = {name: total / count for name, (total, count) in found.items() if count}
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


NONE = RewardSums()
WIDTH = len(fields(RewardSums))


def vector(
    rewards: Tensor, logps: Tensor, desirable: Tensor, *, paired: bool, nll: Tensor | None = None, nll_count: int = 0
) -> Tensor:
    """The sums of a micro-batch, `(WIDTH,)` float64 on its device, which nobody waits for.

    Arguments:
        rewards, logps: `(n,)` of its answers; desirable: `(n,)` bool.
        paired: whether answer i of the first half stands against answer i of the second.
    """
    rewards, logps, wanted = rewards.detach().double(), logps.detach().double(), desirable.double()
    count = wanted.sum()
    sums = rewards.new_zeros(WIDTH)
    sums[:6] = torch.stack(
        [
            (rewards * wanted).sum(),
            (rewards * (1 - wanted)).sum(),
            (logps * wanted).sum(),
            (logps * (1 - wanted)).sum(),
            count,
            len(wanted) - count,
        ]
    )
    if paired:
        better, worse = rewards.chunk(2)
        sums[6], sums[7] = (better > worse).sum(), len(better)
    if nll is not None:
        sums[8], sums[9] = nll.detach(), nll_count
    return sums
