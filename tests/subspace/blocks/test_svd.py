"""Singular triplets: the golden ones, the sign rule, the randomised against the exact, the smallest in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.subspace.blocks import svd
from tests.subspace.golden import SIGMA, VT, U, W

SHAPES = [(96, 64), (64, 96), (80, 80)]


def falling(shape: tuple[int, int], decades: float) -> Tensor:
    """As many values as the shape has, from 1 down by so many powers of ten."""
    return torch.logspace(0, -decades, min(shape), dtype=torch.float64)


def with_spectrum(shape: tuple[int, int], sigma: Tensor) -> Tensor:
    """A float32 matrix with these singular values, up to its rounding."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(n, len(sigma), dtype=torch.float64, generator=generator) for n in shape]
    u, v = (torch.linalg.qr(side).Q for side in sides)
    return ((u * sigma) @ v.t()).float()


def off_the_subspace(v: Tensor, wanted: Tensor) -> float:
    """How far the wanted rows lie outside the span of orthonormal rows v."""
    return float((wanted - wanted @ v.double().t() @ v.double()).norm())


def close(found: svd.Triplets, columns: slice) -> None:
    expected = (U[:, columns], SIGMA[columns], VT[columns])
    for actual, wanted in zip((found.u, found.s, found.v), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_triplets_are_the_golden_ones_signs_included() -> None:
    close(svd.every(W), slice(0, 3))
    close(svd.largest(W, 2, torch.Generator()), slice(0, 2))
    close(svd.largest_exact(W, 1), slice(0, 1))
    close(svd.smallest(W, 1), slice(2, 3))


def test_in_float64_they_are_golden_to_the_last_printed_digit() -> None:
    found = svd.every(W.double())
    torch.testing.assert_close(found.u, U, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.v, VT, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_entry_of_each_left_vector_is_positive(shape: tuple[int, int]) -> None:
    matrix = with_spectrum(shape, falling(shape, 3))
    generator = torch.Generator().manual_seed(0)
    for found in (svd.every(matrix), svd.largest(matrix, 5, generator), svd.smallest(matrix, 5)):
        peaks = found.u.gather(0, found.u.abs().argmax(0)[None])
        assert (peaks > 0).all()
        torch.testing.assert_close(matrix @ found.v.t(), found.u * found.s, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_alone_find_the_largest(shape: tuple[int, int]) -> None:
    matrix = with_spectrum(shape, 10 * falling(shape, 2))
    found, exact = svd.largest(matrix, 6, torch.Generator().manual_seed(1)), svd.every(matrix)
    torch.testing.assert_close(found.s, exact.s[:6])
    torch.testing.assert_close(found.u, exact.u[:, :6], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.v, exact.v[:6], rtol=0, atol=1e-4)


def test_random_draws_come_from_the_generator_alone() -> None:
    matrix = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = svd.largest(matrix, 3, torch.Generator().manual_seed(5), rounds=0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = svd.largest(matrix, 3, torch.Generator().manual_seed(5), rounds=0)
    other = svd.largest(matrix, 3, torch.Generator().manual_seed(6), rounds=0)
    torch.manual_seed(1)
    assert torch.equal(first.v, again.v) and not torch.equal(first.v, other.v)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decades", [4, 7])
def test_the_smallest_are_those_of_float64_where_float32_has_lost_them(shape: tuple[int, int], decades: int) -> None:
    matrix = with_spectrum(shape, falling(shape, decades))
    exact = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = svd.smallest(matrix, 4)
    assert off_the_subspace(found.v, exact.Vh[-4:]) < 2e-6
    assert off_the_subspace(torch.linalg.svd(matrix).Vh[-4:], exact.Vh[-4:]) > 5e-5
    torch.testing.assert_close(found.s.double(), exact.S[-4:], rtol=1e-5, atol=0)


def test_of_a_matrix_that_lacks_rank_the_smallest_are_zero_and_orthonormal() -> None:
    sigma = torch.cat([torch.ones(30), torch.zeros(34)]).double()
    found = svd.smallest(with_spectrum((96, 64), sigma), 5)
    assert found.s.max() < 1e-6
    torch.testing.assert_close(found.v @ found.v.t(), torch.eye(5))
    assert torch.isfinite(found.u).all()
    assert torch.equal(svd.smallest(torch.zeros(6, 9), 2).s, torch.zeros(2))


def test_the_root_of_each_value_goes_to_either_side() -> None:
    a, b = svd.largest_exact(W.double(), 1).balanced(2.0)
    golden_a = [[0.4312631024, -0.6483278679, -0.4073503837, 1.3686272476]]
    golden_b = [[0.5442447802], [-0.9619725419], [1.1932301594]]
    torch.testing.assert_close(a, torch.tensor(golden_a, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(b, torch.tensor(golden_b, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    broken = W.clone()
    broken[1, 2] = float("nan")
    for find in (svd.every, lambda m: svd.smallest(m, 1), lambda m: svd.largest(m, 1, torch.Generator())):
        with pytest.raises(UsageError, match="not finite"):
            find(broken)
