"""Losses of samples over all ranks: batches depend on the samples alone, and results come back in the samples' order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dist_subspace.placement.collectives import gather_objects, world
from dist_subspace.placement.evaluation_mode import in_evaluation
from dist_subspace.stopping import STOP, Interrupted
from dist_subspace.training.data import TokenTable
from dist_subspace.training.data.batches import filler_batch
from dist_subspace.training.data.collate import Collator
from dist_subspace.training.sample_results import sample_results


@dataclass(frozen=True)
class Score:
    """loss: cross-entropy summed over the sample's targets; predicted: the likeliest class, where samples are classified."""

    loss: float
    targets: int
    predicted: int | None


@dataclass(frozen=True)
class Batching:
    """How samples become micro-batches: `size` of them, padded by `pad_id` to a multiple."""

    size: int
    pad_id: int
    pad_to_multiple: int
    device: torch.device


def heed() -> None:
    """Collective: raise `Interrupted` on every rank where one was told to stop."""
    for reason in filter(None, gather_objects(STOP.reason)):
        raise Interrupted(reason)


def scores(model: nn.Module, table: TokenTable, numbers: Sequence[int], how: Batching) -> list[Score]:
    """Collective: of the samples with these numbers, in their order, on every rank.

    A micro-batch holds the same samples whatever the number of ranks is, and a rank without one runs the shortest sample for
    nothing: so every sample has the same result, to the last digit, at any number of ranks of as many threads.
    """
    lengths = table.lengths
    order = sorted(numbers, key=lambda number: (-int(lengths[number]), number))
    micro_batches = [order[start : start + how.size] for start in range(0, len(order), how.size)]
    collate = Collator(table, how.pad_id, pad_to_multiple=how.pad_to_multiple)
    filler, own = filler_batch(collate, 0), []
    with in_evaluation(model):
        for start in range(0, len(micro_batches), world().size):
            heed()
            place = start + world().rank
            held = micro_batches[place] if place < len(micro_batches) else []
            batch = collate([(number,) for number in held], place) if held else filler
            found = sample_results(model, batch, how.device)
            classes = [None] * len(held) if found.predicted is None else found.predicted.tolist()
            own += list(zip(held, map(Score, found.losses.tolist(), found.targets.tolist(), classes)))
    by_number = dict(pair for of_rank in gather_objects(own) for pair in of_rank)
    return [by_number[number] for number in numbers]
