"""Rates are a geometric grid, and each rung has half the rates of the one before for twice as many steps."""

from __future__ import annotations

import math

import pytest
import yaml

from dist_subspace.errors import UsageError
from dist_subspace.rate_search.grid import RATES, WARMUP, beyond, grid, kept, rate_text, rungs


def test_a_grid_goes_three_half_decades_to_each_side_of_its_centre() -> None:
    rates = grid(3e-3)
    assert len(rates) == RATES == 7 and rates[3] == 3e-3
    assert rates[::2] == pytest.approx([9.5e-5, 9.5e-4, 9.5e-3, 9.5e-2]) and rates[1::2] == (3e-4, 3e-3, 3e-2)


@pytest.mark.parametrize("upwards", [True, False])
def test_the_next_rate_is_half_a_decade_beyond_all_others(upwards: bool) -> None:
    further = beyond([1e-3, 1e-1, 1e-2], upwards)
    assert math.log10(further) == pytest.approx(-0.5 if upwards else -3.5, abs=0.01)


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(2, 5, [5]), (3, 9, [4, 9]), (4, 8, [4, 8]), (7, 80, [20, 40, 80]), (8, 4, [1, 2, 4]), (9, 80, [10, 20, 40, 80])],
)
def test_rungs_halve_the_rates_until_two_are_left(count: int, steps: int, expected: list[int]) -> None:
    assert rungs(count, steps) == expected
    left = [count]
    for _ in expected[1:]:
        left.append(kept(left[-1]))
    assert left[-1] == 2
    assert count > 8 or steps < 10 or WARMUP * steps < expected[0], "a rate is compared when its warm-up is over"


def test_fewer_steps_than_halvings_are_refused_with_the_fewest_that_are_accepted() -> None:
    with pytest.raises(UsageError, match=r"--steps is 3 for 7 rates, .* accepted: at least 4, or fewer --rates"):
        rungs(7, 3)


@pytest.mark.parametrize("rate", [3e-3, 1.25e-4, 1.0, 12.0, 5e-10, 0.1])
def test_a_rate_is_written_so_that_yaml_reads_a_number(rate: float) -> None:
    assert yaml.safe_load(rate_text(rate)) == rate
    assert rate_text(3e-3) == "3.0e-3"
