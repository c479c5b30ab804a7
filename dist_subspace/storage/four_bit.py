"""Storages of 4 bits a weight in blocks of 64: `nf4` and `fp4`, bitsandbytes' bytes (arXiv 2305.14314)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.storage.bnb import Packed4bit, dequantize_4bit, quantize_4bit
from dist_subspace.storage.operator import FrozenLinear, Origin
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.raw import from_bytes, to_bytes
from dist_subspace.storage.registry import register


class FourBitLinear(PackedLinear):
    """Parameters, all int8: `codes` the packed matrix; `absmax` one float32 (or, double-quantised, one byte) a block;
    `nested_absmax` the float32 statistics of the statistics. Only the double quantisation's mean is a plain number."""

    absmax: nn.Parameter
    nested_absmax: nn.Parameter

    def __init__(self, packed: Packed4bit, *, bias: Tensor | None, origin: Origin | None) -> None:
        nested = packed.nested
        tensors = {"codes": to_bytes(packed.codes), "absmax": to_bytes(packed.absmax)}
        if nested is not None:
            tensors["nested_absmax"] = to_bytes(nested)
        super().__init__(packed.shape[1], packed.shape[0], tensors, bias=bias, origin=origin)
        self.storage = packed.quant_type
        self.double_quant = nested is not None
        self.offset = packed.offset
        self.blocksize = packed.blocksize

    def packed(self) -> Packed4bit:
        """The parameters as they are now, seen as bitsandbytes' tensors."""
        nested = from_bytes(self.nested_absmax, torch.float32) if self.double_quant else None
        absmax = from_bytes(self.absmax, torch.uint8 if self.double_quant else torch.float32)
        return Packed4bit(
            from_bytes(self.codes, torch.uint8), absmax, nested, self.offset, self.blocksize, self.storage, self.shape
        )

    def decode(self, dtype: torch.dtype) -> Tensor:
        narrow = torch.float32 if dtype == torch.float64 else dtype  # bitsandbytes decodes into 16 and 32 bits
        return dequantize_4bit(self.packed(), narrow).to(dtype)

    def repacked(self, matrix: Tensor) -> FrozenLinear:
        packed = quantize_4bit(matrix, self.storage, double_quant=self.double_quant, blocksize=self.blocksize)
        return FourBitLinear(packed, bias=None, origin=None)

    def plain_values(self) -> dict[str, float]:
        return {"offset": self.offset}


def _register(quant_type: str) -> None:
    @register(quant_type, bits=4)
    def pack(
        weight: Tensor, *, transposed: bool, bias: Tensor | None, origin: Origin | None, double_quant: bool
    ) -> FrozenLinear:
        logical = weight.t() if transposed else weight
        return FourBitLinear(quantize_4bit(logical, quant_type, double_quant=double_quant), bias=bias, origin=origin)


for _quant_type in ("nf4", "fp4"):
    _register(_quant_type)
