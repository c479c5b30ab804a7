"""Storage of 8 bits a weight as small floating-point numbers: `fp8`, float8 e4m3 with one float32 scale a block of 128 x 128.

The layout of the FP8 checkpoints of DeepSeek-V3 (arXiv 2412.19437, 3.3.2) and Qwen3: `W = codes * scale`, the scale (which
their files call `weight_scale_inv`) being the block's largest magnitude over 448. The activations are never quantised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dist_subspace.linear_map import RowPiece
from dist_subspace.storage.operator import FrozenLinear, Origin
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.pieces import FlatTensor, PieceWise
from dist_subspace.storage.raw import float8_numbers, from_bytes, to_bytes
from dist_subspace.storage.registry import adopts, register

BLOCK = 128  # rows and columns
KIND = torch.float8_e4m3fn
LARGEST = torch.finfo(KIND).max  # 448
# Entries that are decoded at a time, in float32: few calls on a GPU, what stays in a cache on a CPU.
STRIP, STRIP_ON_CPU = 1 << 24, 1 << 20


class Fp8Linear(PackedLinear):
    """Parameters, both int8: `codes` `(d_out, d_in)`, `scale` the bytes of one float32 a block, row by row of blocks."""

    scale: nn.Parameter

    storage = "fp8"

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], *, bias: Tensor | None, origin: Origin | None
    ) -> None:
        super().__init__(shape[1], shape[0], tensors, bias=bias, origin=origin)

    def decode(self, dtype: torch.dtype) -> Tensor:
        matrix = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in self.row_slices(BLOCK, STRIP_ON_CPU if matrix.device.type == "cpu" else STRIP):
            matrix[rows] = self._numbers(rows)
        return matrix

    def repacked(self, matrix: Tensor) -> FrozenLinear:
        return pack(matrix, transposed=False, bias=None, origin=None)

    def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
        for rows in self.row_slices(BLOCK):
            piece = self._numbers(rows).to(dtype)
            yield RowPiece(piece, ((0, rows.start, len(piece)),))

    def _numbers(self, rows: slice) -> Tensor:
        """Whole rows of blocks, or the last ones, in float32."""
        scale = from_bytes(self.scale, torch.float32).view(_blocks(self.shape))
        own = scale[rows.start // BLOCK : -(-rows.stop // BLOCK)].repeat_interleave(BLOCK, 1)[:, : self.in_features]
        numbers = float8_numbers(self.codes[rows].view(KIND))
        whole = len(numbers) // BLOCK * BLOCK
        numbers[:whole].view(-1, BLOCK, self.in_features).mul_(own[: whole // BLOCK, None])
        if whole < len(numbers):
            numbers[whole:].mul_(own[-1])
        return numbers


def _holding(codes: Tensor, scale: Tensor, *, bias: Tensor | None, origin: Origin | None) -> Fp8Linear:
    rows, columns = codes.shape
    tensors = {"codes": codes.contiguous().view(torch.int8), "scale": to_bytes(scale)}
    return Fp8Linear(tensors, (rows, columns), bias=bias, origin=origin)


class Fp8Pieces(PieceWise):
    """A unit is a row of blocks."""

    def __init__(self, shape: tuple[int, int], transposed: bool) -> None:
        self.shape, self.unit = shape, BLOCK * shape[1]
        rows, columns = _blocks(shape)
        self.tensors = {
            "codes": FlatTensor(shape, torch.int8, self.unit),
            "scale": FlatTensor((4 * rows * columns,), torch.int8, 4 * columns),
        }
        self.late = {}

    def pack(self, piece: Tensor) -> dict[str, Tensor]:
        codes, scale = quantize(piece.view(-1, self.shape[1]))
        return {"codes": to_bytes(codes), "scale": to_bytes(scale)}

    def operator(
        self, tensors: Mapping[str, nn.Parameter], *, bias: Tensor | None, origin: Origin | None
    ) -> FrozenLinear:
        return Fp8Linear(tensors, self.shape, bias=bias, origin=origin)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `(d_out, d_in)` float8 and scales `(blocks of rows, blocks of columns)` float32 of a matrix of floats."""
    codes = torch.empty(weight.shape, dtype=KIND, device=weight.device)
    scale = torch.empty(_blocks(weight.shape), dtype=torch.float32, device=weight.device)
    for number in range(scale.shape[0]):
        rows = slice(number * BLOCK, (number + 1) * BLOCK)
        strip = weight[rows].float()
        largest = nn.functional.pad(strip.abs().amax(dim=0), (0, -strip.shape[1] % BLOCK)).view(-1, BLOCK).amax(dim=1)
        factor = torch.where(largest > 0, LARGEST / largest, torch.ones_like(largest))  # of a block of zeros, any
        scale[number] = 1 / factor
        strip = strip * factor.repeat_interleave(BLOCK)[: strip.shape[1]]
        codes[rows] = strip.clamp(-LARGEST, LARGEST).to(KIND)
    return codes, scale


def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK)


def _bytes_held(d_out: int, d_in: int) -> int:
    return d_out * d_in + 4 * math.prod(_blocks((d_out, d_in)))


@register(
    "fp8",
    bits=8,
    bytes_held=_bytes_held,
    help="8 bits: float8 e4m3, one scale a block of 128 x 128",
    in_pieces=Fp8Pieces,
)
def pack(weight: Tensor, *, transposed: bool, bias: Tensor | None, origin: Origin | None) -> FrozenLinear:
    return _holding(*quantize(weight.t() if transposed else weight), bias=bias, origin=origin)


def _is_fp8_linear(module: nn.Module) -> bool:
    """transformers' `FP8Linear` in this layout, recognised by name so that storage need not import transformers; scales of
    another type, other blocks and quantised activations with a scale of their own are not this storage's."""
    scale = getattr(module, "weight_scale_inv", None)
    return (
        type(module).__name__ == "FP8Linear"
        and getattr(module, "weight", None) is not None
        and module.weight.dtype == KIND
        and scale is not None
        and scale.dtype == torch.float32
        and tuple(getattr(module, "block_size", None) or ()) == (BLOCK, BLOCK)
        and getattr(module, "activation_scale", None) is None
    )


@adopts(_is_fp8_linear)
def adopt_fp8(module: nn.Module) -> FrozenLinear:
    """The layer's own bytes."""
    weight, scale = (module.get_parameter(name).detach() for name in ("weight", "weight_scale_inv"))
    return _holding(weight, scale, bias=getattr(module, "bias", None), origin=None)
