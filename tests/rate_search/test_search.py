"""Successive halving over gradient descent on x²/2, whose best rate is 1, and which diverges from 2 on."""

from __future__ import annotations

import pytest

from dist_subspace.rate_search.bench import Tried
from dist_subspace.rate_search.grid import EXTENSIONS, grid, rungs
from dist_subspace.rate_search.search import Search


class Descent:
    """x ← x - rate · x, from 1; the first steps of each rate that is trained are remembered."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, int, int]] = []

    def train(self, tried: Tried, steps: int) -> None:
        self.begun.append((tried.rate, tried.steps, steps))
        while tried.steps < steps:
            tried.losses.append((1 - tried.rate) ** (2 * tried.steps) / 2)
            if tried.losses[-1] > 2:
                tried.stopped, tried.diverged = f"diverged at step {tried.steps}", True
                return
        tried.evaluations[steps] = {"eval_loss": (1 - tried.rate) ** (2 * steps) / 2}


def searched(rates: tuple[float, ...], steps: int = 16, extends: bool = True) -> tuple[Search, Descent, list[str]]:
    said: list[str] = []
    descent = Descent()
    search = Search(descent, rates, rungs(len(rates), steps), extends, said.append)
    search.run()
    return search, descent, said


def test_the_better_half_goes_on_from_where_it_stood() -> None:
    search, descent, _ = searched(grid(0.3))
    assert search.best is not None and search.best.rate == 0.95 and search.best.steps == 16 and search.edge is None
    steps = {rate: [(begin, end) for r, begin, end in descent.begun if r == rate] for rate in grid(0.3)}
    assert steps[0.95] == [(0, 4), (4, 8), (8, 16)], "each rung goes on where the one before ended"
    assert steps[3.0] == [(0, 4)], "what diverges is not tried again"
    assert sorted(len(of_rate) for of_rate in steps.values()) == [1, 1, 1, 1, 2, 3, 3]
    dropped = [tried for tried in search.tried if (tried.stopped or "").startswith("not among the best")]
    assert {tried.steps for tried in dropped} == {4, 8} and all(tried.held is None for tried in dropped)


@pytest.mark.parametrize(("centre", "side"), [(0.005, "upper"), (300.0, "lower")])
def test_a_grid_is_extended_to_the_side_of_the_best_one_and_it_is_said(centre: float, side: str) -> None:
    rates = grid(centre)
    search, _, said = searched(rates)
    added = [tried.rate for tried in search.tried[len(rates) :]]
    assert added == sorted(added, reverse=side == "lower") and 0 < len(added) <= EXTENSIONS
    assert (min(added) > max(rates)) if side == "upper" else (max(added) < min(rates))
    assert search.best is not None and search.best.rate in added
    assert sum("is tried, too" in line for line in said) == len(added)


def test_where_every_rate_diverges_lower_ones_are_tried_and_not_for_ever() -> None:
    search, _, said = searched((30.0, 90.0))
    assert [tried.rate for tried in search.tried][2:] == [9.5, 3.0, 0.95, 0.3] and search.best is not None
    assert sum(line.startswith("every rate diverges: ") for line in said) == 3 and search.best.rate == 0.95
    search, _, _ = searched((1e30, 3e30))
    assert len(search.tried) == 2 + EXTENSIONS and search.best is None and search.edge is None


def test_rates_that_were_given_stay_as_they_are_and_the_end_is_known() -> None:
    search, _, _ = searched((0.01, 0.1), extends=False)
    assert [tried.rate for tried in search.tried] == [0.01, 0.1] and search.edge == "upper"
    assert search.best is not None and search.best.rate == 0.1


def test_the_best_is_one_of_those_that_got_furthest_and_did_not_diverge() -> None:
    search = Search(Descent(), [0.1, 0.2, 0.3], [2, 4], False, lambda text: None)
    low, middle, high = search.tried
    low.evaluations = {2: {"eval_loss": 0.1}}
    middle.evaluations = {2: {"eval_loss": 0.3}, 4: {"eval_loss": 0.2}}
    high.evaluations, high.diverged = {2: {"eval_loss": 0.2}}, True
    assert search.best is middle
    middle.diverged = True
    assert search.best is low
