"""What is drawn in a micro-batch is a function of the run's seed and of its number, and of both."""

from __future__ import annotations

import itertools

import torch

from dist_subspace.training.randomness import seed_micro_batch


def drawn(seed: int, number: int, before: int = 0) -> torch.Tensor:
    torch.rand(before)  # whatever ran before
    seed_micro_batch(seed, number)
    return torch.nn.functional.dropout(torch.ones(256), 0.5)


def test_each_micro_batch_of_each_run_has_draws_of_its_own_whatever_ran_before() -> None:
    places = [(seed, number) for seed in (0, 1, 11) for number in (0, 1, 11, 111)]
    for one, other in itertools.combinations(places, 2):
        assert not torch.equal(drawn(*one), drawn(*other)), f"{one} and {other} draw the same"
    for place in places:
        assert torch.equal(drawn(*place), drawn(*place, before=7))
