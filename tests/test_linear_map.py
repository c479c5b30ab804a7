"""Products with a frozen matrix: their gradients are autograd's, and no tensor of the matrix is kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace.linear_map import on_rows, product_type, through

GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(3, 4, generator=GENERATOR)


class Map:
    """A matrix `(3, 4)` that may change between forward and backward."""

    def __init__(self) -> None:
        self.matrix = MATRIX.clone()
        self.products = self.transposed = 0

    def product(self, x: Tensor) -> Tensor:
        self.products += 1
        return x @ self.matrix.t()

    def transposed_product(self, g: Tensor) -> Tensor:
        self.transposed += 1
        return g @ self.matrix


def kept(work: Any) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        work()
    return saved


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4)])
def test_product_and_gradient_are_those_of_the_matrix(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=GENERATOR).requires_grad_()
    upstream = torch.randn(*shape[:-1], 3, generator=GENERATOR)
    y = through(Map(), x)
    torch.testing.assert_close(y, x @ MATRIX.t())
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(gradient, upstream @ MATRIX)


def test_backward_asks_for_the_matrix_again_and_keeps_nothing_of_it() -> None:
    frozen, x = Map(), torch.ones(2, 4, requires_grad=True)
    found: list[Tensor] = []
    assert kept(lambda: found.append(through(frozen, x))) == []
    frozen.matrix *= 2  # as an engine gathers the weight into another buffer
    found[0].sum().backward()
    torch.testing.assert_close(x.grad, 2 * MATRIX.sum(0).expand(2, 4))
    assert (frozen.products, frozen.transposed) == (1, 1)


def test_an_input_that_needs_no_gradient_has_none() -> None:
    frozen = Map()
    assert not through(frozen, torch.ones(2, 4)).requires_grad
    with torch.no_grad():
        assert not through(frozen, torch.ones(2, 4, requires_grad=True)).requires_grad
    assert frozen.transposed == 0


def test_rows_are_flattened_for_a_product_and_put_back() -> None:
    seen: list[tuple[int, ...]] = []

    def product(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x.sum(1, keepdim=True)

    x = torch.arange(24.0).view(2, 3, 4)
    torch.testing.assert_close(on_rows(product, x), x.sum(-1, keepdim=True))
    assert seen == [(6, 4)]


def test_products_run_in_the_inputs_own_type_where_the_device_has_them() -> None:
    assert product_type(torch.ones(1)) == torch.float32
    assert product_type(torch.ones(1, dtype=torch.float64)) == torch.float64
    assert product_type(torch.ones(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
