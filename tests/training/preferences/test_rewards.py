"""Figures of preferences are means over all answers, however these were divided."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.training.preferences.rewards import NONE, RewardSums, vector


def sums(rewards: list[float], desirable: list[bool], paired: bool, **more: object) -> RewardSums:
    values = torch.tensor(rewards)
    found = vector(values, 10 * values, torch.tensor(desirable), paired=paired, **more)  # type: ignore[arg-type]
    return RewardSums.of(found.tolist())


def test_pairs_have_accuracies_and_margins() -> None:
    first = sums([1.0, 2.0, 0.5, 3.0], [True, True, False, False], True, nll=torch.tensor(6.0), nll_count=4)
    second = sums([4.0, 1.0], [True, False], True, nll=torch.tensor(3.0), nll_count=1)
    found = RewardSums.summed([first, second, RewardSums(kl=0.25, kl_count=1.0)]).figures()
    assert found == pytest.approx(
        {
            "rewards/chosen": 7 / 3,
            "rewards/rejected": 1.5,
            "rewards/accuracies": 2 / 3,
            "rewards/margins": 7 / 3 - 1.5,
            "logps/chosen": 70 / 3,
            "logps/rejected": 15,
            "nll_loss": 1.8,
            "kl": 0.25,
        }
    )


def test_single_answers_have_no_accuracies_and_what_nobody_had_is_no_figure() -> None:
    assert "rewards/accuracies" not in sums([1.0, 2.0], [True, False], False).figures()
    assert sums([1.0, 2.0], [True, True], False).figures() == {"rewards/chosen": 1.5, "logps/chosen": 15.0}
    assert NONE.figures() == {} and RewardSums.of(NONE.numbers()) == NONE
