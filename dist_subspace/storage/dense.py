"""Storages that hold the matrix as it is: `fp32`, `bf16`, `fp16`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.linear_map import RowPiece, product_type
from dist_subspace.storage.linear_layers import is_conv1d, linear_shape
from dist_subspace.storage.operator import FrozenLinear, Origin
from dist_subspace.storage.pieces import FlatTensor, PieceWise
from dist_subspace.storage.registry import register


class DenseLinear(FrozenLinear):
    """The matrix in floating point; `transposed` means that the bytes hold `(in_features, out_features)`, as GPT-2's do.

    Adopting a layer costs nothing: the parameter is the layer's own object, in the layer's own layout, tied or not.
    """

    weight: nn.Parameter
    matrix_name = "weight"

    def __init__(
        self, weight: Tensor, shape: tuple[int, int], *, transposed: bool, bias: Tensor | None, origin: Origin | None
    ) -> None:
        if weight.dtype not in _NAMES:
            raise UsageError(f"a linear layer's weight is {weight.dtype}; accepted: {', '.join(map(str, _NAMES))}")
        super().__init__(shape[1], shape[0], {"weight": weight}, bias=bias, origin=origin)
        self.transposed = self.conv1d = transposed
        self.storage = _NAMES[weight.dtype]

    def decode(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.to(dtype)
        return weight.t() if self.transposed else weight

    @property
    def is_float(self) -> bool:
        return True

    @property
    def takes_row_pieces(self) -> bool:
        return not self.transposed

    def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
        if not self.is_in_pieces:
            yield from super().row_pieces(dtype)
            return
        assert self.row_source is not None  # is_in_pieces says so
        for piece in self.row_source():
            yield RowPiece(piece.rows.to(dtype), piece.runs)

    def product(self, x: Tensor) -> Tensor:
        if not self.is_in_pieces:
            return super().product(x)
        wide = product_type(x)
        y, rows = x.new_empty(len(x), self.out_features), x.to(wide)
        for piece in self.row_pieces(wide):
            part = rows @ piece.rows.t()
            for place, first, count in piece.runs:
                y[:, first : first + count] = part[:, place : place + count]
        return y

    def transposed_product(self, g: Tensor) -> Tensor:
        """The pieces' parts are summed in float32 (float64 where products are), whatever type they have."""
        if not self.is_in_pieces:
            return super().transposed_product(g)
        wide = product_type(g)
        sums = g.new_zeros(len(g), self.in_features, dtype=torch.promote_types(wide, torch.float32))
        for piece in self.row_pieces(wide):
            for place, first, count in piece.runs:
                sums += g[:, first : first + count].to(wide) @ piece.rows[place : place + count]
        return sums.to(g.dtype)

    def repacked(self, matrix: Tensor) -> FrozenLinear:
        held = matrix.to(self.weight.dtype)
        return DenseLinear(
            held.t().contiguous() if self.transposed else held,
            self.shape,
            transposed=self.transposed,
            bias=None,
            origin=None,
        )


def adopt_plain(module: nn.Module) -> FrozenLinear:
    """A plain linear layer as it is: its own parameters, in its own layout and type."""
    return DenseLinear(
        module.get_parameter("weight"),
        linear_shape(module),
        transposed=is_conv1d(module),
        bias=getattr(module, "bias", None),
        origin=None,
    )


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class DensePieces(PieceWise):
    """Every entry by itself, in the layout that the checkpoint has."""

    unit, as_given = 1, True

    def __init__(self, dtype: torch.dtype, shape: tuple[int, int], transposed: bool) -> None:
        self.dtype, self.shape, self.transposed = dtype, shape, transposed
        self.tensors = {"weight": FlatTensor(shape[::-1] if transposed else shape, dtype, 1)}
        self.late = {}

    def pack(self, piece: Tensor) -> dict[str, Tensor]:
        return {"weight": piece.to(self.dtype)}

    def operator(
        self, tensors: Mapping[str, nn.Parameter], *, bias: Tensor | None, origin: Origin | None
    ) -> FrozenLinear:
        return DenseLinear(tensors["weight"], self.shape, transposed=self.transposed, bias=bias, origin=origin)


def _register(dtype: torch.dtype, name: str) -> None:
    def bytes_held(d_out: int, d_in: int) -> int:
        return d_out * d_in * dtype.itemsize

    @register(
        name,
        bits=dtype.itemsize * 8,
        dtype=dtype,
        bytes_held=bytes_held,
        help=f"{str(dtype).removeprefix('torch.')}, unquantised",
        in_pieces=partial(DensePieces, dtype),
    )
    def pack(weight: Tensor, *, transposed: bool, bias: Tensor | None, origin: Origin | None) -> FrozenLinear:
        shape = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        return DenseLinear(weight.to(dtype), shape, transposed=transposed, bias=bias, origin=origin)


for _dtype, _name in _NAMES.items():
    _register(_dtype, _name)
