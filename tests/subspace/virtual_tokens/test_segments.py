"""Borders of samples that share a row."""

from __future__ import annotations

import torch

from dist_subspace.subspace.virtual_tokens.segments import kernel_lengths, segments


def test_a_border_is_where_positions_do_not_grow_by_one() -> None:
    places = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    assert segments(places, 2) == [[0, 3, 5], [0, 5]]
    assert segments(torch.arange(5)[None], 3) is None
    assert segments(torch.tensor([[0, 0, 0]]), 2) == [[0, 1, 2, 3]] * 2
    assert segments(torch.zeros(3, 1, 2, dtype=torch.long), 1) is None


def test_positions_that_are_written_over_are_read_again() -> None:
    places = torch.arange(4)[None].clone()
    assert segments(places, 1) is None
    places[0, 2:] = torch.arange(2)
    assert segments(places, 1) == [[0, 2, 4]]


def test_lengths_count_over_flattened_rows() -> None:
    found = kernel_lengths(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 10] and found["max_length_k"] == 4
