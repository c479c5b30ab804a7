"""Correlations: those of scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dist_subspace.metrics.correlation import pearson, spearman


@pytest.mark.parametrize("values", [5, 1000], ids=["many that are equal", "few"])
def test_correlations_are_those_of_scipy(values: int) -> None:
    generator = np.random.default_rng(values)
    x = generator.integers(0, values, 200)
    y = x + generator.integers(0, values, 200)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_constant_has_no_correlation() -> None:
    assert math.isnan(pearson(np.ones(3), np.arange(3))) and math.isnan(spearman(np.arange(1), np.arange(1)))
