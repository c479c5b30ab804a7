"""Stacks of experts that a file holds as the storage does: which bytes of which experts' weights are the stack's.

A stack is its experts' rows one below another, and so are its codes; its scales are rows of blocks. Where every expert's weight,
or the two that are joined to one, gives whole blocks, the bytes of the stack are theirs one behind the other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dist_subspace.loading.held_weight import AsHeld, HeldWeight, ReadBytes
from dist_subspace.loading.layout import Layout
from dist_subspace.storage import PieceWise

# How the storage packs one expert, with these options of it.
PiecesOf = Callable[[Mapping[str, object]], PieceWise]


@dataclass(frozen=True)
class JoinedBytes:
    """pieces: how each expert is packed. as_held: what the stack's tensors are read from. plain: each expert's plain values."""

    pieces: PieceWise
    as_held: AsHeld
    plain: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Rows:
    """Rows of a stack that are rows of a weight of the file: the expert, the first row there, the weight's key, the first row of
    it, and how many they are."""

    expert: int
    row: int
    key: str
    first: int
    rows: int


def joined(
    layout: Layout, held: Callable[[str], HeldWeight | None], storage: str, pieces_of: PiecesOf
) -> JoinedBytes | None:
    """How the storage takes the bytes of a stack `(experts, d_out, d_in)`; None where it would not hold the same numbers.

    Arguments:
        held: how the file holds the weight with a key.
    """
    experts, d_out, d_in = layout.shape
    parts = rows_of(layout) or []
    weights = [held(part.key) for part in parts]
    if not parts or any(weight is None or weight.shape[-1] != d_in for weight in weights):
        return None
    whole = len(parts) == experts and all(weight is not None and weight.shape == (d_out, d_in) for weight in weights)
    taken = [
        weight.as_held(storage) if whole else weight.rows_as_held(storage, part.first, part.rows)
        for weight, part in zip(weights, parts, strict=True)
        if weight is not None
    ]
    found = [how for how in taken if how is not None]
    if len(found) < len(parts) or any(how.options != found[0].options for how in found):
        return None
    pieces = pieces_of(found[0].options)
    specs = {**pieces.tensors, **(pieces.late if whole else {})}
    if not whole and (pieces.late or any(how.plain for how in found)):
        return None
    sizes: dict[str, list[int]] = {name: [] for name in specs}
    for part in parts:
        begun, within = divmod(part.row * d_in, pieces.unit)  # a unit is a block, a row, or a row of blocks
        if within:
            return None
        for name, spec in specs.items():
            before, many = begun * spec.per_unit, part.rows * d_in // pieces.unit * spec.per_unit
            sizes[name].append(spec.numel - before if part.row + part.rows == d_out else many)
    sources = {name: _Joined([how.tensors[name] for how in found], sizes[name]).read for name in specs}
    plain = tuple(how.plain for how in found) if whole else ({},) * experts
    return JoinedBytes(pieces, AsHeld(found[0].options, sources), plain)


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
