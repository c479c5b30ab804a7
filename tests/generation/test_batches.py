"""Batches depend on the prompts alone, and no row of a batch cuts another one's answer."""

from __future__ import annotations

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.generation.batches import Batch, batches, check_lengths


def test_neighbours_are_answered_together_and_a_row_without_room_with_its_own_length_alone() -> None:
    made = batches([3, 5, 4, 28, 28, 3, 3], 3, 10, 32)
    assert made == [Batch(0, 3, 10), Batch(3, 5, 4), Batch(5, 7, 10)]


def test_rows_of_different_lengths_stand_apart_where_the_model_does_not_take_padding() -> None:
    assert batches([3, 3, 4, 3], 8, 10, None, pads=False) == [Batch(0, 2, 10), Batch(2, 3, 10), Batch(3, 4, 10)]


def test_what_is_left_of_the_prompts_has_the_batches_that_it_had() -> None:
    lengths = [3, 5, 4, 28, 3, 3]
    assert batches(lengths, 2, 10, 32, first=2) == batches(lengths, 2, 10, 32)[1:]


def test_an_encoder_and_its_decoder_have_their_positions_apart() -> None:
    assert batches([30, 3], 2, 40, 32, apart=True) == [Batch(0, 2, 32)]
    check_lengths([32], 32, apart=True)


def test_a_prompt_that_leaves_no_room_is_named() -> None:
    check_lengths([31], 32)
    with pytest.raises(UsageError, match=r"prompt 2 has 32 tokens, and 1 other is too long; accepted: at most 31"):
        check_lengths([3, 32, 40], 32)
