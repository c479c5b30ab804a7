"""A matrix that is packed piece by piece has the bytes of the one that is packed whole, in every storage, wherever it is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dist_subspace.storage import FrozenLinear, pack, storage_info, storages
from dist_subspace.storage.pieces import PieceWise

SHAPES = [(172, 64), (7, 5), (33, 31), (9, 1), (300, 128), (257, 130)]
# Every storage, and for each option that is a switch both ways.
HELD = [
    (name, {option: value})
    for name, info in sorted(storages().items())
    for option, value in [(o, v) for o in info.options for v in (False, True)] or [("", None)]
]


def packed_in_pieces(pieces: PieceWise, flat: Tensor, units: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of an operator, flat, from pieces of so many units."""
    held = {name: torch.zeros(spec.numel, dtype=spec.dtype) for name, spec in pieces.tensors.items()}
    statistic = torch.zeros(pieces.statistic.numel if pieces.statistic else 0)
    for first in range(0, pieces.units, units):
        packed = pieces.pack(flat[first * pieces.unit : (first + units) * pieces.unit])
        for name, spec in pieces.tensors.items():
            start = first * spec.per_unit
            held[name][start : start + packed[name].numel()] = packed[name]
        if pieces.statistic is not None:
            statistic[first * pieces.statistic.per_unit :][: packed[pieces.STATISTIC].numel()] = packed[
                pieces.STATISTIC
            ]
    values = pieces.plain_values(statistic) if pieces.statistic else {}
    return held | (pieces.late_tensors(statistic, values) if pieces.statistic else {}), values


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("storage", "options"), HELD, ids=str)
def test_pieces_make_the_bytes_of_the_whole(storage: str, options: dict, dtype: torch.dtype, transposed: bool) -> None:
    options = {name: value for name, value in options.items() if name}
    in_pieces = storage_info(storage).in_pieces
    assert in_pieces is not None
    for d_out, d_in in SHAPES:
        given = torch.randn((d_in, d_out) if transposed else (d_out, d_in), dtype=dtype)
        whole = pack(given, storage, transposed=transposed, **options)
        pieces = in_pieces((d_out, d_in), transposed, **options)
        flat = (given.t() if transposed and not pieces.as_given else given).reshape(-1)
        specs = {**pieces.tensors, **pieces.late}
        assert list(specs) == [name for name, _ in whole.named_parameters()]
        for units in (1, 3, pieces.units):
            tensors, values = packed_in_pieces(pieces, flat, units)
            for name, parameter in whole.named_parameters():
                assert specs[name].shape == tuple(parameter.shape) and specs[name].dtype == parameter.dtype
                assert torch.equal(tensors[name], parameter.detach().reshape(-1)), (name, units)
            assert {**whole.plain_values(), **values} == whole.plain_values()
            assert bool(values) == bool(pieces.late)
        again = rebuilt(pieces, tensors, values)
        assert type(again) is type(whole) and again.shape == whole.shape and again.options() == whole.options()
        assert torch.equal(again.dense(), whole.dense())


def rebuilt(pieces: PieceWise, tensors: dict[str, Tensor], values: dict[str, float]) -> FrozenLinear:
    specs = {**pieces.tensors, **pieces.late}
    parameters = {n: nn.Parameter(t.view(specs[n].shape), requires_grad=False) for n, t in tensors.items()}
    operator = pieces.operator(parameters, bias=None, origin=None)
    operator.set_plain_values(values)
    return operator


@pytest.mark.parametrize(("storage", "options"), HELD, ids=str)
def test_units_give_all_entries_of_every_tensor(storage: str, options: dict) -> None:
    in_pieces = storage_info(storage).in_pieces
    assert in_pieces is not None
    for shape in SHAPES:
        pieces = in_pieces(shape, False, **{name: value for name, value in options.items() if name})
        assert (pieces.units - 1) * pieces.unit < math.prod(shape) <= pieces.units * pieces.unit
        for spec in pieces.tensors.values():
            assert (pieces.units - 1) * spec.per_unit < spec.numel <= pieces.units * spec.per_unit
