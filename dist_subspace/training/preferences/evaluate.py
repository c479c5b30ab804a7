"""Held-out preferences, in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dist_subspace.placement.collectives import sum_over_ranks
from dist_subspace.placement.evaluation_mode import in_evaluation
from dist_subspace.placement.protocol import Engine
from dist_subspace.run_folder.records import EVALUATED
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.objective import Objective
from dist_subspace.training.preferences.rewards import RewardSums


@torch.no_grad()
def evaluate_preferences(
    model: nn.Module | Engine,
    objective: Objective,
    rounds: Sequence[MicroBatch | None],
    filler: MicroBatch,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Collective: the objective's mean loss over the held-out pairs or answers, and their figures, alike on any number of ranks
    and for any size of micro-batches: KTO's distance from the base is taken over all of them.

    `stopped` is asked before each call, by all ranks alike; None if it said so.
    """
    own = [batch for batch in rounds if batch is not None]
    chosen = [batch.preferences.chosen_tokens for batch in own if batch.preferences is not None]
    counts = sum_over_ranks([float(sum(batch.terms for batch in own)), float(sum(chosen))], device)
    terms, chosen_tokens = map(int, counts)
    loss = 0.0
    with in_evaluation(model):
        if not objective.begin(model, rounds, filler, terms, chosen_tokens, stopped):
            return None
        for batch in rounds:
            if stopped():
                return None
            found = objective.loss(model, filler if batch is None else batch, batch is not None)
            loss += float(found) if batch is not None else 0.0
    total, *sums = sum_over_ranks([loss, *objective.take().numbers()], device)
    figures = RewardSums.of(sums).figures()
    return {f"{EVALUATED}loss": total / max(1, terms)} | {
        f"{EVALUATED}{name}": value for name, value in figures.items()
    }
