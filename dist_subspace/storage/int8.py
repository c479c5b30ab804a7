"""Storage of 8 bits a weight, row-wise absmax: `int8`, bitsandbytes' bytes (arXiv 2208.07339) with an exact product.

The activations are never quantised: an outlier in one token would change the others (docs/design.md, "int8 is exact").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dist_subspace.linear_map import RowPiece
from dist_subspace.storage.bnb import Packed8bit, is_8bit, quantize_8bit, read_8bit
from dist_subspace.storage.operator import FrozenLinear, Origin
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.pieces import FlatTensor, PieceWise
from dist_subspace.storage.raw import from_bytes, to_bytes
from dist_subspace.storage.registry import adopts, register


class Int8Linear(PackedLinear):
    """Parameters, both int8: `codes` `(d_out, d_in)`, `scale` the bytes of one float32 a row."""

    scale: nn.Parameter

    storage = "int8"

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], *, bias: Tensor | None, origin: Origin | None
    ) -> None:
        super().__init__(shape[1], shape[0], tensors, bias=bias, origin=origin)

    def _row_scale(self) -> Tensor:
        return from_bytes(self.scale, torch.float32) / 127

    def decode(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self._row_scale()[:, None]).to(dtype)

    def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
        scale = self._row_scale()[:, None]
        for rows in self.row_slices():
            piece = (self.codes[rows].float() * scale[rows]).to(dtype)
            yield RowPiece(piece, ((0, rows.start, len(piece)),))

    def repacked(self, matrix: Tensor) -> FrozenLinear:
        return _holding(quantize_8bit(matrix), bias=None, origin=None)

    # The codes are exact in bfloat16 and float32, so the row scale can wait until after the product. In float16 the
    # unscaled sums would overflow.

    def entries(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype == torch.float16:
            return super().entries(dtype)
        return self.codes.to(dtype), self._row_scale().to(dtype)


def _holding(packed: Packed8bit, *, bias: Tensor | None, origin: Origin | None) -> Int8Linear:
    rows, columns = packed.codes.shape
    tensors = {"codes": packed.codes.contiguous(), "scale": to_bytes(packed.scale)}
    return Int8Linear(tensors, (rows, columns), bias=bias, origin=origin)


class Int8Pieces(PieceWise):
    """A unit is a row, which has one scale."""

    def __init__(self, shape: tuple[int, int], transposed: bool) -> None:
        self.shape, self.unit = shape, shape[1]
        self.tensors = {
            "codes": FlatTensor(shape, torch.int8, shape[1]),
            "scale": FlatTensor((4 * shape[0],), torch.int8, 4),
        }
        self.late = {}

    def pack(self, piece: Tensor) -> dict[str, Tensor]:
        packed = quantize_8bit(piece.view(-1, self.unit))
        return {"codes": to_bytes(packed.codes), "scale": to_bytes(packed.scale)}

    def operator(
        self, tensors: Mapping[str, nn.Parameter], *, bias: Tensor | None, origin: Origin | None
    ) -> FrozenLinear:
        return Int8Linear(tensors, self.shape, bias=bias, origin=origin)


def _bytes_held(d_out: int, d_in: int) -> int:
    return d_out * d_in + 4 * d_out


@register("int8", bits=8, bytes_held=_bytes_held, help="8 bits, one scale a row", in_pieces=Int8Pieces)
def pack(weight: Tensor, *, transposed: bool, bias: Tensor | None, origin: Origin | None) -> FrozenLinear:
    return _holding(quantize_8bit(weight.t() if transposed else weight), bias=bias, origin=origin)


@adopts(is_8bit)
def adopt_8bit(module: nn.Module) -> FrozenLinear:
    """bitsandbytes' `Linear8bitLt`, byte for byte."""
    return _holding(read_8bit(module), bias=getattr(module, "bias", None), origin=None)
