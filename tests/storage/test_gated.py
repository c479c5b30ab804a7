"""Frozen operators changed entry by entry: `x Wᵀ + branch (W ⊙ Δ)ᵀ` in row tiles, for every storage and layout."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from dist_subspace.linear_map import Gate
from dist_subspace.storage import FrozenLinear, operator, pack, storages

OUT, IN, TOKENS = 23, 14, 6
each_storage = pytest.mark.parametrize("storage", sorted(storages()))
each_layout = pytest.mark.parametrize("transposed", [False, True])


class TableGate:
    """Δ is a trained table; notes which rows it was asked for."""

    def __init__(self, table: Tensor) -> None:
        self.factors: tuple[Tensor, ...] = (table,)
        self.asked: list[slice] = []

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        self.asked.append(rows)
        return self.factors[0][rows].to(dtype)

    def gradients(self, tiles: Iterable[tuple[slice, Tensor]]) -> tuple[Tensor, ...]:
        (table,) = self.factors
        gradient = torch.full_like(table, float("nan"))
        for rows, piece in tiles:
            gradient[rows] = piece.to(table.dtype)
        return (gradient,)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "TILE", 5 * IN)


def made(storage: str, transposed: bool) -> tuple[FrozenLinear, Tensor]:
    """An operator with bias, and the trained table of its gate."""
    weight = torch.randn(*(IN, OUT) if transposed else (OUT, IN))
    table = (0.3 * torch.randn(OUT, IN)).requires_grad_(True)
    return pack(weight, storage, transposed=transposed, bias=torch.randn(OUT)), table


@each_storage
@each_layout
@pytest.mark.parametrize("apart", [False, True])
def test_products_and_gradients_are_the_dense_formulas(storage: str, transposed: bool, apart: bool) -> None:
    base, table = made(storage, transposed)
    x = torch.randn(2, TOKENS // 2, IN, requires_grad=True)
    branch = torch.randn(2, TOKENS // 2, IN, requires_grad=True) if apart else None
    gate: Gate = TableGate(table)
    y = base(x, gate, branch)
    w = base.dense()
    expected = x @ w.t() + (x if branch is None else branch) @ (w * table).t() + base.bias
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    inputs = [x, table, *([] if branch is None else [branch])]
    g = torch.randn_like(y)
    for mine, dense in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-5)


@each_storage
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_close(storage: str, dtype: torch.dtype) -> None:
    base, table = made(storage, False)
    x = torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True)
    y = base(x, TableGate(table))
    wide = x.detach().float().requires_grad_(True)
    expected = wide @ (base.dense() * (1 + table)).t() + base.bias
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    y.float().sum().backward()
    mine, table.grad = table.grad, None
    expected.sum().backward()
    torch.testing.assert_close(mine, table.grad, rtol=0.05, atol=0.1)
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=0.05, atol=0.1)


def test_a_small_change_is_not_lost_in_16_bits() -> None:
    """`W + W ⊙ Δ` in bfloat16 is W itself for a Δ of 2^-10; beside it, the change is there."""
    base = pack(torch.ones(1, IN), "bf16")
    x = torch.zeros(1, IN, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 1, -1
    table = torch.zeros(1, IN)
    table[0, 0] = 2**-10
    assert base(x, TableGate(table)).item() == 2**-10


@each_storage
def test_where_nothing_is_changed_it_is_the_base_bit_for_bit(storage: str) -> None:
    base, table = made(storage, False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(TOKENS, IN, dtype=dtype)
        assert torch.equal(base(x, TableGate(torch.zeros_like(table))), base(x))


@each_storage
@each_layout
def test_it_is_asked_for_in_tiles_and_neither_the_weight_nor_the_change_is_kept(storage: str, transposed: bool) -> None:
    base, table = made(storage, transposed)
    gate = TableGate(table)
    kept: list[Tensor] = []
    x = torch.randn(TOKENS, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = base(x, gate)
    assert gate.asked == [slice(0, 5), slice(5, 10), slice(10, 15), slice(15, 20), slice(20, 23)]
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), table.data_ptr()}
    y.sum().backward()
    assert torch.isfinite(table.grad).all(), "every row once"


def test_the_weight_is_read_again_in_backward() -> None:
    """As a sharding engine wants it, which released it after forward and gathers it anew."""
    base, table = made("fp32", False)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    y = base(x, TableGate(table))
    base.weight.data = torch.zeros_like(base.weight)
    y.sum().backward()
    assert not x.grad.any() and not table.grad.any()
