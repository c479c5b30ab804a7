"""Loss and perplexity."""

from __future__ import annotations

import math

import numpy as np

LARGEST = 700.0  # the exponential of more is no number of float64's


def mean_loss(losses: np.ndarray, targets: np.ndarray) -> float:
    """Summed losses `(n,)` over the numbers of targets `(n,)`: each target weighs the same. The sum is the same in any order."""
    return math.fsum(losses) / max(1.0, float(np.sum(targets)))


def perplexity(loss: float) -> float:
    return math.exp(min(loss, LARGEST))
