"""Storage of 8 bits a weight, row-wise absmax: `int8`, bitsandbytes' bytes (arXiv 2208.07339) with an exact product.

The activations are never quantised: an outlier in one token would change the others (docs/design.md, "int8 is exact").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.storage.bnb import Packed8bit, is_8bit, quantize_8bit, read_8bit
from dist_subspace.storage.operator import FrozenLinear, Origin
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.raw import from_bytes, to_bytes
from dist_subspace.storage.registry import adopts, register


class Int8Linear(PackedLinear):
    """Parameters, both int8: `codes` `(d_out, d_in)`, `scale` the bytes of one float32 a row."""

    scale: nn.Parameter

    storage = "int8"

    def __init__(self, packed: Packed8bit, *, bias: Tensor | None, origin: Origin | None) -> None:
        rows, columns = packed.codes.shape
        tensors = {"codes": packed.codes.contiguous(), "scale": to_bytes(packed.scale)}
        super().__init__(columns, rows, tensors, bias=bias, origin=origin)

    def _row_scale(self) -> Tensor:
        return from_bytes(self.scale, torch.float32) / 127

    def decode(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self._row_scale()[:, None]).to(dtype)

    def repacked(self, matrix: Tensor) -> FrozenLinear:
        return Int8Linear(quantize_8bit(matrix), bias=None, origin=None)

    # The codes are exact in bfloat16 and float32, so the row scale can wait until after the product. In float16 the
    # unscaled sums would overflow.

    def entries(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype == torch.float16:
            return super().entries(dtype)
        return self.codes.to(dtype), self._row_scale().to(dtype)


def _bytes_held(d_out: int, d_in: int) -> int:
    return d_out * d_in + 4 * d_out


@register("int8", bits=8, bytes_held=_bytes_held, help="8 bits, one scale a row")
def pack(weight: Tensor, *, transposed: bool, bias: Tensor | None, origin: Origin | None) -> FrozenLinear:
    return Int8Linear(quantize_8bit(weight.t() if transposed else weight), bias=bias, origin=origin)


@adopts(is_8bit)
def adopt_8bit(module: nn.Module) -> FrozenLinear:
    """bitsandbytes' `Linear8bitLt`, byte for byte."""
    return Int8Linear(read_8bit(module), bias=getattr(module, "bias", None), origin=None)
