"""Tables and heads of a few hundred bytes, treated as those of gigabytes are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dist_subspace.placement.deepspeed import in_place
from dist_subspace.training import cross_entropy


@contextmanager
def from_the_first_byte(piece: int = 600) -> Iterator[None]:
    """Tables and heads of any size are large."""
    before = (in_place.LOOKED_UP_FROM, in_place.IN_PIECES_FROM, in_place.PIECE, cross_entropy.PIECE)
    in_place.LOOKED_UP_FROM, in_place.IN_PIECES_FROM, in_place.PIECE, cross_entropy.PIECE = 0, 0, piece, 40
    try:
        yield
    finally:
        in_place.LOOKED_UP_FROM, in_place.IN_PIECES_FROM, in_place.PIECE, cross_entropy.PIECE = before
