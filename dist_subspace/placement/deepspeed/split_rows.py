"""Rows of a matrix that ZeRO-3 has split, had without the whole matrix: a few looked up where they are, or all of them in pieces.

Read against deepspeed 0.19.8 (`runtime/zero/partition_parameters.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_split_rows.py fails when it moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_subspace.linear_map import RowPiece
from dist_subspace.placement.deepspeed.secondary import second_shard
from dist_subspace.placement.deepspeed.shards import full_shape, is_partitioned, kept


@dataclass(frozen=True)
class SplitRows:
    """A matrix `(rows, width)` that the ranks of a group hold flat, one shard after the other, whatever rows they cut.

    shard: this rank's, flat, with the padding after the matrix's end; rank, ranks: in the group.
    """

    shard: Tensor
    group: Any
    rank: int
    ranks: int
    rows: int
    width: int

    def part(self, rank: int) -> tuple[int, int]:
        """The entries of the matrix that a rank holds: the first, and the one behind the last."""
        numel, length = self.rows * self.width, self.shard.numel()
        return min(numel, rank * length), min(numel, (rank + 1) * length)

    def touched(self, rank: int) -> range:
        """The rows of which a rank holds an entry."""
        start, stop = self.part(rank)
        return range(start // self.width, -(-stop // self.width)) if start < stop else range(self.rows, self.rows)

    def begun(self, rank: int) -> range:
        """The rows whose first entry a rank holds: every row is one rank's."""
        start, stop = self.part(rank)
        return range(-(-start // self.width), -(-stop // self.width))

    @property
    def cut(self) -> bool:
        """Whether a row may lie on two ranks."""
        return self.shard.numel() % self.width != 0


def split_rows(parameter: Any) -> SplitRows | None:
    """Local, alike on every rank: the shards of a matrix, those that lie near where there are second ones; None where its rows
    cannot be had so: no matrix, shards on NVMe or quantised by ZeRO (`ds_tensor`'s `final_location` and `ds_quant_scale`), or
    shorter than a row."""
    if not is_partitioned(parameter) or len(full_shape(parameter)) != 2:
        return None
    held = parameter.ds_tensor
    location = getattr(held, "final_location", None)
    if str(getattr(location, "value", location)) == "nvme" or hasattr(held, "ds_quant_scale"):
        return None
    second = second_shard(parameter)
    shard = kept(parameter)[0] if second is None else second[0]
    group = parameter.ds_process_group if second is None else parameter.ds_zero_param_process_group
    rows, width = full_shape(parameter)
    if shard.numel() < width or not rows:
        return None
    return SplitRows(shard, group, dist.get_rank(group), dist.get_world_size(group), rows, width)


def look_up(split: SplitRows, ids: Tensor) -> Tensor | None:
    """Collective: the rows `(..., width)` of this rank's ids, of any shape, to the last bit, on the device of the ids; None on
    every rank where it would take some rank more rows, sent or received, than a gather of the matrix.

    Each rank asks the others for the rows that it has not, each of them once.
    """
    distinct, places = torch.unique(ids, return_inverse=True)
    found = _exchanged(split, distinct)
    return None if found is None else found.index_select(0, places.flatten()).view(*ids.shape, split.width)


def _exchanged(split: SplitRows, ids: Tensor) -> Tensor | None:
    """Collective: the rows of ids that ascend, each once."""
    if split.ranks == 1:
        return _own(split, ids)
    touched = [split.touched(rank) for rank in range(split.ranks)]
    first, last = (
        torch.searchsorted(ids, torch.tensor(ends, device=ids.device))
        for ends in ([t.start for t in touched], [t.stop for t in touched])
    )
    asked = torch.empty(split.ranks * split.ranks, dtype=torch.long, device=ids.device)
    _gather(asked, last - first, split)
    numbers = torch.cat([asked, first]).tolist()  # the one wait for the device
    counts = [numbers[rank * split.ranks : (rank + 1) * split.ranks] for rank in range(split.ranks)]
    if _busiest(counts) * split.ranks > split.rows * (split.ranks - 1):
        return None
    mine, of_me = counts[split.rank], [row[split.rank] for row in counts]
    begins = numbers[-split.ranks :]
    wanted = torch.cat([ids[begin : begin + count] for begin, count in zip(begins, mine, strict=True)]).int()
    theirs = wanted.new_empty(sum(of_me))
    dist.all_to_all_single(theirs, wanted, of_me, mine, group=split.group)
    given = _bytes(_own(split, theirs.long()))
    got = given.new_empty(sum(mine), given.shape[1])
    dist.all_to_all_single(got, given, mine, of_me, group=split.group)
    rows = given.new_zeros(len(ids), given.shape[1])
    for begin, part in zip(begins, got.split(mine), strict=True):
        rows[begin : begin + len(part)] |= part  # of a row that is cut, each rank has given zeros for what it has not
    return rows.view(split.shard.dtype)


def _busiest(counts: Sequence[Sequence[int]]) -> int:
    """The most rows that one rank sends to others, or has from them."""
    others = [[0 if rank == other else n for other, n in enumerate(row)] for rank, row in enumerate(counts)]
    return max(*map(sum, others), *map(sum, zip(*others, strict=True)))


def _own(split: SplitRows, ids: Tensor) -> Tensor:
    """Local: rows `(k, width)` on the ids' device, with zeros for what other ranks hold of them."""
    start, stop = split.part(split.rank)
    width, shard, here = split.width, split.shard, ids.to(split.shard.device)
    first, last = -(-start // width), stop // width
    if first < last:
        whole = shard[first * width - start : last * width - start].view(-1, width)
        rows = whole.index_select(0, (here - first).clamp(0, len(whole) - 1))
    else:
        rows = shard.new_zeros(len(ids), width)
    for row in sorted({place // width for place in (start, stop) if place % width}):
        edge = shard.new_zeros(width)
        low, high = max(start, row * width), min(stop, (row + 1) * width)
        edge[low - row * width : high - row * width] = shard[low - start : high - start]
        rows = torch.where((here == row)[:, None], edge, rows)
    return rows.to(ids.device)


def _bytes(rows: Tensor) -> Tensor:
    """Back ends know few types; bytes are sent as they are."""
    return rows.contiguous().view(torch.uint8)


def row_pieces(split: SplitRows, device: torch.device, size: int) -> Iterator[RowPiece]:
    """Collective: every row of the matrix once, in pieces of about `size` bytes on the device, from all ranks alike; the next one
    comes while a piece is used."""
    most = max(len(split.begun(rank)) for rank in range(split.ranks))
    number, each = in_pieces(most, split.ranks, split.width * split.shard.element_size(), size)
    tail = _tail(split, device)
    coming = _piece(split, device, 0, each, tail)
    for piece in range(number):
        rows, work = coming
        if piece + 1 < number:
            coming = _piece(split, device, piece + 1, each, tail)
        if work is not None:
            work.wait()
        yield RowPiece(rows.view(-1, split.width), _runs(split, piece, each))


def in_pieces(rows: int, ranks: int, row_bytes: int, size: int) -> tuple[int, int]:
    """How many pieces of at most about `size` bytes, all alike, and how many rows of each rank are in one.

    Arguments:
        rows: of the rank that has the most.
    """
    number = math.ceil(rows / max(1, size // (ranks * row_bytes)))
    return number, math.ceil(rows / number)


def _runs(split: SplitRows, piece: int, each: int) -> tuple[tuple[int, int, int], ...]:
    runs = []
    for rank in range(split.ranks):
        rows = split.begun(rank)[piece * each : (piece + 1) * each]
        if rows:
            runs.append((rank * each, rows.start, len(rows)))
    return tuple(runs)


def _piece(split: SplitRows, device: torch.device, piece: int, each: int, tail: Tensor) -> tuple[Tensor, Any]:
    """Begin to gather a piece: where it will be, and what to wait for."""
    start, stop = split.part(split.rank)
    rows = split.begun(split.rank)[piece * each : (piece + 1) * each]
    low, high = rows.start * split.width - start, rows.stop * split.width - start
    own = split.shard[low : min(high, stop - start)] if rows else split.shard[:0]
    own = own.to(device, non_blocking=True)
    if own.numel() < each * split.width:
        own = torch.cat([own, tail] if high > stop - start and rows else [own])
        own = torch.nn.functional.pad(own, (0, each * split.width - own.numel()))
    if split.ranks == 1:
        return own, None
    whole = own.new_empty(split.ranks * own.numel())
    return whole, _gather(whole.view(torch.uint8), own.contiguous().view(torch.uint8), split, async_op=True)


def _tail(split: SplitRows, device: torch.device) -> Tensor:
    """Collective: what the next rank holds of the last row that this rank holds the beginning of."""
    if split.ranks == 1 or not split.cut:
        return torch.empty(0, dtype=split.shard.dtype, device=device)
    own = split.shard[: split.width].to(device)
    beginnings = own.new_empty(split.ranks * split.width)
    _gather(beginnings.view(torch.uint8), own.view(torch.uint8), split)
    stop = split.part(split.rank)[1]
    missing = split.begun(split.rank).stop * split.width - stop if split.begun(split.rank) else 0
    following = (split.rank + 1) * split.width
    return beginnings[following : following + max(0, missing)]


def _gather(whole: Tensor, own: Tensor, split: SplitRows, async_op: bool = False) -> Any:
    """Collective. torch has renamed the function, and warns of its older name."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(whole, own, group=split.group, async_op=async_op)
