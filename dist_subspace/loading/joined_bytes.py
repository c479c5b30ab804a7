"""Stacks of experts that a file holds as the storage does: which bytes of which experts' weights are the stack's.

A stack is its experts' rows one below another, and so are its codes; its scales are rows of blocks. Where every expert's weight,
or the two that are joined to one, gives whole rows of blocks, the bytes of the stack are theirs one behind the other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dist_subspace.loading.held_weight import AsHeld, HeldWeight, ReadBytes
from dist_subspace.loading.layout import Layout
from dist_subspace.storage import PieceWise


@dataclass(frozen=True)
class Rows:
    """Rows of a stack that are rows of a weight of the file: the expert, the first row there, the weight's key, the first row of
    it, and how many they are."""

    expert: int
    row: int
    key: str
    first: int
    rows: int


def joined(layout: Layout, held: Callable[[str], HeldWeight | None], storage: str, pieces: PieceWise) -> AsHeld | None:
    """How the storage takes the bytes of a stack `(experts, d_out, d_in)`; None where it would not hold the same numbers.

    Arguments:
        held: how the file holds the weight with a key.
        pieces: of one expert.
    """
    d_out, d_in = pieces.shape
    taken: list[AsHeld] = []
    sizes: dict[str, list[int]] = {name: [] for name in pieces.tensors}
    for rows in rows_of(layout) or ():
        weight, last = held(rows.key), rows.row + rows.rows == d_out
        if weight is None or weight.shape[-1] != d_in or pieces.late:
            return None
        how = weight.rows_as_held(storage, rows.first, rows.rows)
        begun, within = divmod(rows.row * d_in, pieces.unit)  # a unit is a row, or a row of blocks
        if how is None or how.plain or within:
            return None
        taken.append(how)
        for name, spec in pieces.tensors.items():
            before, many = begun * spec.per_unit, rows.rows * d_in // pieces.unit * spec.per_unit
            sizes[name].append(spec.numel - before if last else many)
    if not taken:
        return None
    sources = {name: _Joined([one.tensors[name] for one in taken], sizes[name]).read for name in sizes}
    return AsHeld(taken[0].options, sources)


def rows_of(layout: Layout) -> list[Rows] | None:
    """The layout of a stack as whole rows, in order; None where it is put together in another way."""
    _, _, d_in = layout.shape
    found = []
    for box in layout.boxes:
        whole = box.start[2] == 0 and box.shape[2] == d_in and box.offset % d_in == 0
        in_order = box.strides[2] == 1 and (box.shape[1] == 1 or box.strides[1] == d_in)
        if not whole or not in_order or (box.shape[0] > 1 and box.strides[0] % d_in):
            return None
        for number in range(box.shape[0]):
            first = (box.offset + number * box.strides[0]) // d_in
            found.append(Rows(box.start[0] + number, box.start[1], box.key, first, box.shape[1]))
    return sorted(found, key=lambda rows: (rows.expert, rows.row))


class _Joined:
    """Sources one behind the other as one `Source`."""

    def __init__(self, sources: Sequence[Callable[[ReadBytes, int, int], Tensor]], sizes: Sequence[int]) -> None:
        self._sources, self._ends = sources, list(accumulate(sizes))

    def read(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start, dtype=torch.int8)
        for number in range(bisect_right(self._ends, start), len(self._sources)):
            begin = self._ends[number - 1] if number else 0
            low, high = max(start, begin), min(stop, self._ends[number])
            if low >= high:
                break
            values[low - start : high - start] = self._sources[number](read, low - begin, high - begin)
        return values
