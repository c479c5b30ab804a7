"""Intervals of 95 % around a figure: Wilson's for a share, the bootstrap's for anything else."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Z = 1.959963984540054  # of the normal distribution, for 95 %
RESAMPLES = 1000
SEED = 0

Interval = tuple[float, float]


def wilson(hits: int, count: int) -> Interval:
    """Wilson's score interval of the share `hits / count`; (0, 1) where there is nothing."""
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, Z * Z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(count: int, figure: Callable[[np.ndarray], float]) -> Interval | None:
    """The percentile interval of a figure of `count` samples, drawn anew `RESAMPLES` times by a seed of its own: the same
    wherever and however often it is asked for. None for fewer than two samples, or where the figure is no number.

    Arguments:
        figure: of the samples `(count,)`, by number, some of them several times.
    """
    if count < 2:
        return None
    generator = np.random.default_rng(SEED)
    drawn = np.array([figure(generator.integers(0, count, count)) for _ in range(RESAMPLES)])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
