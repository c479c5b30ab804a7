"""Rows of a split matrix, to the last bit: looked up where they are, whatever rows the shards cut, and all of them in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.partitioner import Partitioner
from dist_subspace.placement.deepspeed.split_rows import SplitRows, look_up, row_pieces, split_rows
from tests.ranks import run_on_ranks
from tests.sent_bytes import recorded

CPU = torch.device("cpu")
ROWS, WIDTH = 101, 7


def matrix(dtype: torch.dtype, rows: int = ROWS) -> Tensor:
    """With a zero that is negative and a number that is none, which sums would change."""
    values = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(4)).to(dtype)
    values[::3, 1] = -0.0
    values[2, 2] = torch.nan
    return values


def held(values: Tensor, **zero: Any) -> nn.Parameter:
    parameter = nn.Parameter(values.clone(), requires_grad=False)
    Partitioner({"zero_optimization": {"stage": 3, **zero}}).place(parameter)
    return parameter


def split(values: Tensor, **zero: Any) -> SplitRows:
    found = split_rows(held(values, **zero))
    assert found is not None
    return found


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def asked(rank: int) -> Tensor:
    """Every rank has other ids, and other numbers of them: the last rank none, the first nearly all rows, cut ones too."""
    sizes = [(2, 9), (1, 3), (3, 5), (0, 4)]
    ids = torch.randint(0, ROWS, sizes[rank], generator=torch.Generator().manual_seed(rank))
    return torch.arange(2, ROWS - 9).flip(0) if rank == 0 else ids


def looked_up(dtype: torch.dtype, zero: dict[str, Any]) -> tuple[bool, list[Any]]:
    values, ids = matrix(dtype), asked(world().rank)
    with recorded() as messages:
        rows = look_up(split(values, **zero), ids)
    assert rows is not None
    return torch.equal(bits(rows), bits(values[ids])), [(m.kind, m.ranks) for m in messages]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_has_the_files_bits_of_the_rows_that_it_asked_for(dtype: torch.dtype, ranks: int) -> None:
    for right, messages in run_on_ranks(ranks, looked_up, dtype, {}):
        assert right
        assert [kind for kind, _ in messages] == (["gather", "exchange", "exchange"] if ranks > 1 else [])


def test_second_shards_are_asked_within_the_node() -> None:
    for rank, (right, messages) in enumerate(
        run_on_ranks(4, looked_up, torch.bfloat16, {"zero_hpz_partition_size": 2})
    ):
        assert right
        node = (0, 1) if rank < 2 else (2, 3)
        assert {group for _, group in messages} == {node}


def refused(ids: int) -> tuple[bool, int]:
    with recorded() as messages:
        rows = look_up(split(matrix(torch.bfloat16)), torch.arange(ids if world().rank else 0))
    return rows is None, len(messages)


def test_where_a_gather_would_send_less_every_rank_knows_it() -> None:
    """Of 101 rows the first of two ranks holds 50 and a part of the next; a gather sends half of them."""
    assert run_on_ranks(2, refused, 50) == [(False, 3), (False, 3)]
    assert run_on_ranks(2, refused, 51) == [(True, 1), (True, 1)]
    assert run_on_ranks(4, refused, 20) == [(False, 3)] * 4
    assert run_on_ranks(4, refused, ROWS) == [(True, 1)] * 4


def pieced(dtype: torch.dtype, size: int, zero: dict[str, Any]) -> tuple[bool, list[int]]:
    values = matrix(dtype)
    whole, seen = torch.zeros_like(values), torch.zeros(ROWS, dtype=torch.long)
    sizes = []
    for piece in row_pieces(split(values, **zero), CPU, size):
        sizes.append(len(piece.rows))
        for place, first, count in piece.runs:
            whole[first : first + count] = piece.rows[place : place + count]
            seen[first : first + count] += 1
    return torch.equal(bits(whole), bits(values)) and bool((seen == 1).all()), sizes


@pytest.mark.parametrize("size", [1, 8 * WIDTH, 1 << 20])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_row_comes_once_in_pieces_of_the_size(ranks: int, size: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for right, sizes in run_on_ranks(ranks, pieced, dtype, size, {}):
            assert right
            assert all(rows * WIDTH * dtype.itemsize <= max(size, ranks * WIDTH * dtype.itemsize) for rows in sizes)


def test_pieces_come_from_second_shards() -> None:
    for right, _ in run_on_ranks(4, pieced, torch.bfloat16, 64, {"zero_hpz_partition_size": 2}):
        assert right


def odd_ones() -> list[bool]:
    vector = nn.Parameter(torch.zeros(9), requires_grad=False)
    Partitioner({"zero_optimization": {"stage": 3}}).place(vector)
    return [split_rows(p) is None for p in (vector, held(matrix(torch.bfloat16, 3)), nn.Parameter(torch.zeros(4, 4)))]


def test_what_has_no_rows_of_its_own_on_a_rank_is_gathered() -> None:
    """A vector, a matrix of fewer rows than ranks, and one that is not split."""
    assert run_on_ranks(4, odd_ones) == [[True, True, True]] * 4
