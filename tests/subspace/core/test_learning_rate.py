"""Declared rates: a power law between the widths that they stand for."""

from __future__ import annotations

import pytest

from dist_subspace.subspace.core.learning_rate import WIDTHS, LearningRate


def test_at_its_three_widths_a_rate_is_what_was_declared() -> None:
    declared = LearningRate(1e-1, 1e-2, 1e-4, "nobody")
    assert [declared.at(width) for width in WIDTHS] == pytest.approx([1e-1, 1e-2, 1e-4])


def test_between_two_widths_lies_a_power_law() -> None:
    declared = LearningRate(1e-1, 1e-2, 1e-4, "nobody")
    between = (WIDTHS[1] * WIDTHS[2]) ** 0.5
    assert declared.at(round(between)) == pytest.approx((1e-2 * 1e-4) ** 0.5, rel=1e-3)


def test_below_the_narrowest_it_stays_and_beyond_the_widest_it_falls_on() -> None:
    declared = LearningRate(1e-1, 1e-2, 1e-4, "nobody")
    assert declared.at(8) == pytest.approx(1e-1)
    assert declared.at(WIDTHS[2] ** 2 // WIDTHS[1]) == pytest.approx(1e-6, rel=1e-3)
