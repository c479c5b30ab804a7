"""Intervals: those of scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dist_subspace.metrics.intervals import bootstrap, wilson


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (37, 100), (1, 1), (867, 3080)])
def test_the_interval_of_a_share_is_wilsons(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_share_of_nothing_may_be_anything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_of_a_mean_is_that_of_scipy_and_always_the_same() -> None:
    values = np.random.default_rng(1).exponential(size=400)
    found = bootstrap(len(values), lambda some: float(values[some].mean()))
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=2).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), rel=0.02)
    assert found == bootstrap(len(values), lambda some: float(values[some].mean()))


def test_there_is_no_interval_of_one_sample_or_of_no_number() -> None:
    assert bootstrap(1, lambda some: 1.0) is None and bootstrap(5, lambda some: math.nan) is None
