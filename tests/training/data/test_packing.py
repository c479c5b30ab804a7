"""Rows of packed samples."""

from __future__ import annotations

import numpy as np

from dist_subspace.training.data.packing import pack


def test_every_sample_is_in_exactly_one_row_and_no_row_is_too_long() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 500).tolist()
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert rows == pack(lengths, 64)
    assert sum(lengths) / (64 * len(rows)) > 0.85  # how full rows are


def test_a_sample_goes_into_the_oldest_open_row_and_old_rows_close() -> None:
    assert pack([6, 7, 4, 3], 10) == [[0, 2], [1, 3]]
    assert pack([6, 7, 4], 10, open_rows=1) == [[0], [1], [2]]
