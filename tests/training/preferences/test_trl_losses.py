"""TRL's own functions are called, and another release of it is refused before a run."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch

from dist_subspace.config.names import DPO_LOSSES, KTO_LOSSES
from dist_subspace.config.preference import PreferenceArguments
from dist_subspace.errors import UsageError
from dist_subspace.training.preferences.trl_losses import check_trl, paired_loss, unpaired_loss

trl = pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
COMPLETIONS = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1]])


def logps(seed: int = 0) -> torch.Tensor:
    drawn = -torch.rand(4, 2, generator=torch.Generator().manual_seed(seed))
    return drawn * COMPLETIONS[:, 1:]


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_a_loss_of_pairs_is_a_mean_over_them(loss_type: Any) -> None:
    """However pairs are divided, so that ranks and rounds of micro-batches make no difference."""
    smoothing = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    arguments = PreferenceArguments(loss_type=loss_type, label_smoothing=smoothing)
    reference = logps(1).sum(1)
    whole = paired_loss(arguments, logps(), COMPLETIONS, reference)
    halves = [
        paired_loss(arguments, logps()[rows], COMPLETIONS[rows], reference[rows])
        for rows in (torch.tensor([0, 2]), torch.tensor([1, 3]))
    ]
    assert math.isclose(float(whole), float(sum(halves)) / 2, rel_tol=1e-5)


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_a_loss_of_single_answers_is_a_mean_and_hides_no_number_that_is_none(loss_type: Any) -> None:
    arguments, kl = PreferenceArguments(loss_type=loss_type), torch.full((1,), 0.3)
    labels, reference = torch.tensor([True, False, True, True]), logps(1).sum(1)

    def loss(rows: slice, values: torch.Tensor) -> float:
        return float(unpaired_loss(arguments, values[rows], COMPLETIONS[rows], reference[rows], labels[rows], kl))

    parts = 3 * loss(slice(0, 3), logps()) + loss(slice(3, 4), logps())
    assert math.isclose(loss(slice(0, 4), logps()), parts / 4, rel_tol=1e-5)
    damaged = logps()
    damaged[2, 0] = math.nan
    assert math.isnan(loss(slice(0, 4), damaged))


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_trl_that_is_absent_or_computes_something_else_is_refused(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.experimental.orpo import ORPOTrainer

    check_trl(objective, PreferenceArguments())
    kinds = {"dpo": (trl.DPOTrainer, "_compute_loss"), "kto": (trl.KTOTrainer, "_compute_loss")}
    kind, name = kinds.get(objective, (ORPOTrainer, "odds_ratio_loss"))
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, lambda trainer, *given: [torch.zeros(1)] if objective == "orpo" else torch.zeros(()))
        with pytest.raises(UsageError, match=r"its loss of a known case is 0\.0+, and was"):
            check_trl(objective, PreferenceArguments())
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, lambda trainer, *given: trainer.something_new)
        with pytest.raises(UsageError, match=r"AttributeError.*accepted: pip install dist-subspace\[trl\]"):
            check_trl(objective, PreferenceArguments())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"which is not installed; accepted: pip install dist-subspace\[trl\]"):
        check_trl(objective, PreferenceArguments())
