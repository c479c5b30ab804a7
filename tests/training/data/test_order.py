"""The order of an epoch is a function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from dist_subspace.training.data.order import epoch_size, sample_order


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    first = sample_order(100, seed=3, epoch=1)
    assert sorted(first.tolist()) == list(range(100))
    assert np.array_equal(first, sample_order(100, seed=3, epoch=1))
    assert not np.array_equal(first, sample_order(100, seed=3, epoch=2))
    assert not np.array_equal(first, sample_order(100, seed=4, epoch=1))


def test_a_weight_is_how_often_the_samples_of_a_file_come() -> None:
    shares = [(10, 2.5), (20, 0.25), (5, 1.0)]
    counts = np.bincount(sample_order(shares, seed=0, epoch=0), minlength=35)
    assert counts[:10].sum() == 25 and set(counts[:10]) == {2, 3}
    assert counts[10:30].sum() == 5 and set(counts[10:30]) == {0, 1}
    assert set(counts[30:]) == {1}
    assert epoch_size(shares) == counts.sum()
    other = np.bincount(sample_order(shares, seed=0, epoch=1), minlength=35)
    assert not np.array_equal(counts[10:30], other[10:30])  # another fourth of the file


def test_a_tiny_weight_still_gives_a_sample() -> None:
    assert epoch_size([(10, 0.001)]) == 1 == len(sample_order([(10, 0.001)], 0, 0))


def test_a_fraction_is_rounded_to_the_nearest_number_of_samples_and_drawn_by_the_seed() -> None:
    for weight, count in ((0.26, 3), (0.24, 2), (0.96, 10), (1.38, 14), (2.04, 20)):
        assert epoch_size([(10, weight)]) == count == len(sample_order([(10, weight)], seed=0, epoch=0)), weight
    drawn = {tuple(sorted(sample_order([(100, 0.1)], seed, epoch=0).tolist())) for seed in range(4)}
    assert len(drawn) == 4
