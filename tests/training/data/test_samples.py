"""What a sample counts as: its targets, and the tokens that it lost."""

from __future__ import annotations

import numpy as np

from dist_subspace.training.data.samples import NOTHING, Outcome, Sample


def test_the_first_token_is_never_a_target() -> None:
    assert Sample([5, 6, 7], [True, False, True]).targets == 1
    assert Sample([5], [True]).targets == 0
    assert Sample(np.array([5, 6]), np.array([0, 1], bool)).targets == 1


def test_the_tokens_that_were_cut_are_counted_for_a_sample_that_is_left() -> None:
    sample = Sample([1, 2], [False, True])
    assert Outcome(sample, 5).dropped == 3
    assert Outcome(sample, 2).dropped == 0
    assert Outcome(None, 5).dropped == 0 and NOTHING.dropped == 0
