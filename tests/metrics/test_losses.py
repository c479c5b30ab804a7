"""Loss and perplexity by their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_subspace.metrics.losses import mean_loss, perplexity


def test_each_target_weighs_the_same_and_the_order_does_not_matter() -> None:
    losses, targets = np.array([1e16, 3.0, -1e16, 1.0]), np.array([1, 5, 1, 1])
    assert mean_loss(losses, targets) == mean_loss(losses[::-1], targets[::-1]) == 0.5


def test_perplexity_is_the_exponential_of_the_loss_and_always_a_number() -> None:
    assert perplexity(2.0) == pytest.approx(math.e**2) and math.isfinite(perplexity(1e9))
