"""Storages of 4 bits a weight in blocks of 64: `nf4` and `fp4`, bitsandbytes' bytes (arXiv 2305.14314)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.linear_map import RowPiece
from dist_subspace.options import flag
from dist_subspace.storage.bnb import (
    NESTED_BLOCKSIZE,
    Packed4bit,
    absmax_offset,
    dequantize_4bit,
    is_4bit,
    plain_absmax,
    quantize_4bit,
    quantize_4bit_blocks,
    quantize_absmax,
    read_4bit,
)
from dist_subspace.storage.operator import FrozenLinear, Origin
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.pieces import FlatTensor, PieceWise
from dist_subspace.storage.raw import from_bytes, to_bytes
from dist_subspace.storage.registry import adopts, register

BLOCKSIZE = 64


class FourBitLinear(PackedLinear):
    """Parameters, all int8: `codes` the packed matrix; `absmax` one float32 (or, double-quantised, one byte) a block;
    `nested_absmax` the float32 statistics of the statistics. Only the double quantisation's mean is a plain number."""

    absmax: nn.Parameter
    nested_absmax: nn.Parameter

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        quant_type: str,
        *,
        offset: float = 0.0,
        blocksize: int = BLOCKSIZE,
        bias: Tensor | None,
        origin: Origin | None,
    ) -> None:
        super().__init__(shape[1], shape[0], tensors, bias=bias, origin=origin)
        self.storage = quant_type
        self.double_quant = "nested_absmax" in tensors
        self.offset = offset
        self.blocksize = blocksize

    def packed(self) -> Packed4bit:
        """The parameters as they are now, seen as bitsandbytes' tensors."""
        nested = from_bytes(self.nested_absmax, torch.float32) if self.double_quant else None
        absmax = from_bytes(self.absmax, torch.uint8 if self.double_quant else torch.float32)
        return Packed4bit(
            from_bytes(self.codes, torch.uint8), absmax, nested, self.offset, self.blocksize, self.storage, self.shape
        )

    def decode(self, dtype: torch.dtype) -> Tensor:
        return _decoded(self.packed(), dtype)

    def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
        packed, width = self.packed(), self.in_features
        packed = replace(packed, absmax=plain_absmax(packed), nested=None)
        for rows in self.row_slices(self.blocksize // math.gcd(width, self.blocksize)):
            first, end = rows.start * width, rows.stop * width
            part = replace(
                packed,
                codes=packed.codes[first // 2 : -(-end // 2)],
                absmax=packed.absmax[first // self.blocksize : -(-end // self.blocksize)],
                shape=(rows.stop - rows.start, width),
            )
            yield RowPiece(_decoded(part, dtype), ((0, rows.start, part.shape[0]),))

    def repacked(self, matrix: Tensor) -> FrozenLinear:
        packed = quantize_4bit(matrix, self.storage, double_quant=self.double_quant, blocksize=self.blocksize)
        return _holding(packed, bias=None, origin=None)

    def options(self) -> dict[str, Any]:
        return {"double_quant": self.double_quant}

    def plain_values(self) -> dict[str, float]:
        return {"offset": self.offset}


def _decoded(packed: Packed4bit, dtype: torch.dtype) -> Tensor:
    narrow = torch.float32 if dtype == torch.float64 else dtype  # bitsandbytes decodes into 16 and 32 bits
    return dequantize_4bit(packed, narrow).to(dtype)


def _holding(packed: Packed4bit, *, bias: Tensor | None, origin: Origin | None) -> FourBitLinear:
    tensors = {"codes": to_bytes(packed.codes), "absmax": to_bytes(packed.absmax)}
    if packed.nested is not None:
        tensors["nested_absmax"] = to_bytes(packed.nested)
    return FourBitLinear(
        tensors,
        packed.shape,
        packed.quant_type,
        offset=packed.offset,
        blocksize=packed.blocksize,
        bias=bias,
        origin=origin,
    )


class FourBitPieces(PieceWise):
    """A unit is a block. Double quantisation waits for the absmax of all blocks: it subtracts their mean."""

    def __init__(
        self,
        quant_type: str,
        shape: tuple[int, int],
        transposed: bool,
        double_quant: bool,
        blocksize: int = BLOCKSIZE,
    ) -> None:
        self.quant_type, self.shape, self.unit = quant_type, shape, blocksize
        codes = FlatTensor((math.ceil(shape[0] * shape[1] / 2),), torch.int8, blocksize // 2)
        if double_quant:
            self.tensors = {"codes": codes}
            self.statistic = FlatTensor((self.units,), torch.float32, 1)
            nested = math.ceil(self.units / NESTED_BLOCKSIZE)
            self.late = {
                "absmax": FlatTensor((self.units,), torch.int8),
                "nested_absmax": FlatTensor((4 * nested,), torch.int8),
            }
        else:
            self.tensors = {"codes": codes, "absmax": FlatTensor((4 * self.units,), torch.int8, 4)}
            self.late = {}

    def pack(self, piece: Tensor) -> dict[str, Tensor]:
        codes, absmax = quantize_4bit_blocks(piece, self.quant_type, blocksize=self.unit)
        if self.statistic is not None:
            return {"codes": to_bytes(codes), self.STATISTIC: absmax}
        return {"codes": to_bytes(codes), "absmax": to_bytes(absmax)}

    def plain_values(self, statistic: Tensor) -> dict[str, float]:
        return {"offset": absmax_offset(statistic)}

    def late_tensors(self, statistic: Tensor, values: Mapping[str, float]) -> dict[str, Tensor]:
        absmax, nested = quantize_absmax(statistic, values["offset"])
        return {"absmax": to_bytes(absmax), "nested_absmax": to_bytes(nested)}

    def operator(
        self, tensors: Mapping[str, nn.Parameter], *, bias: Tensor | None, origin: Origin | None
    ) -> FrozenLinear:
        return FourBitLinear(tensors, self.shape, self.quant_type, blocksize=self.unit, bias=bias, origin=origin)


def _bytes_held(d_out: int, d_in: int, double_quant: bool) -> int:
    blocks = math.ceil(d_out * d_in / BLOCKSIZE)
    statistics = blocks + 4 * math.ceil(blocks / NESTED_BLOCKSIZE) if double_quant else 4 * blocks
    return math.ceil(d_out * d_in / 2) + statistics


def _register(quant_type: str, help: str) -> None:
    @register(
        quant_type,
        bits=4,
        bytes_held=_bytes_held,
        help=help,
        options={"double_quant": flag(True, "Quantise the statistics too, to one byte a block.")},
        in_pieces=partial(FourBitPieces, quant_type),
    )
    def pack(
        weight: Tensor, *, transposed: bool, bias: Tensor | None, origin: Origin | None, double_quant: bool
    ) -> FrozenLinear:
        logical = weight.t() if transposed else weight
        return _holding(quantize_4bit(logical, quant_type, double_quant=double_quant), bias=bias, origin=origin)


_register("nf4", "4 bits: quantiles of the normal distribution, in blocks of 64")
_register("fp4", "4 bits: floating point with 2 bits of exponent, in blocks of 64")


@adopts(is_4bit)
def adopt_4bit(module: nn.Module) -> FrozenLinear:
    """bitsandbytes' `Linear4bit`, byte for byte."""
    return _holding(read_4bit(module), bias=getattr(module, "bias", None), origin=None)
