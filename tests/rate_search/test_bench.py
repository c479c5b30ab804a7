"""A rate begins where a run begins, and goes on where it stood, whatever other rates have done to the model meanwhile."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dist_subspace.rate_search.bench import NATS, Tried, divergence
from tests.ranks import run_on_ranks
from tests.rate_search.searches import STEPS, bench_of, configuration, differences


@pytest.mark.parametrize(
    "method",
    ["adalora", "lora-dash", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "pissa", "flexlora"))],
)
def test_a_rate_that_is_tried_between_others_is_a_run_at_that_rate_bit_for_bit(home: Path, method: str) -> None:
    """Every loss, every held-out loss, masters and moments, the method's schedule; dropout and weight decay are on."""
    assert differences(str(home), method, "none") == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("method", ["lora", "adalora", "lora-dash"])
def test_so_it_is_on_two_ranks_at_every_stage(home: Path, method: str, preset: str) -> None:
    assert run_on_ranks(2, differences, str(home), method, preset) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_so_it_is_with_masters_beside_16_bits(home: Path, stage: int) -> None:
    stock = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    assert run_on_ranks(2, differences, str(home), "lora", f"bf16-{stage}", stock) == [[], []]


def test_a_rate_that_is_much_too_high_is_given_up_and_the_next_one_knows_nothing_of_it(home: Path) -> None:
    config = configuration(home, "never", max_grad_norm=0.0, optim="sgd")
    bench = bench_of(config, home / "search-sgd")
    first, wild, again = Tried(1e-2), Tried(1e6), Tried(1e-2)
    for tried in (first, wild, again):
        bench.train(tried, STEPS)
    assert wild.diverged and (wild.stopped or "").startswith("diverged: ") and wild.steps < STEPS
    assert not wild.evaluations and wild.held is None and wild.loss_at(STEPS) == math.inf
    assert again.losses == first.losses and again.evaluations == first.evaluations


def test_a_rate_diverges_by_what_is_not_finite_or_by_a_mean_far_above_the_start() -> None:
    assert divergence([], 2.0, 0) is None
    assert divergence([2.0, math.nan], 2.0, 0) == "diverged: step 2 was not finite"
    assert divergence([2.0, 2.0], 2.0, 1) == "diverged: step 2 was not finite"
    assert divergence([9.0] * 4, 2.0, 0) is None, "a few samples may be hard"
    assert divergence([2.0, *[4.0] * 5], 2.0, 0) is None
    assert divergence([2.0, *[4.1] * 5], 2.0, 0) == "diverged: training loss 4.1 at step 6"
    assert divergence([0.9] * 5, 0.01, 0) is None and divergence([0.02 + NATS] * 5, 0.01, 0) is not None
