"""Singular triplets of a frozen matrix, made once at set-up on one rank (docs/methods.md, "Singular triplets").

The largest come from products alone, all of them or the smallest from a full decomposition. The sign that a pair of vectors
has in common is settled by a rule (docs/methods.md, "Signs"), so that methods whose result depends on it start alike everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_subspace.errors import UsageError

OVERSAMPLING = 8  # of the iteration for the largest
MARGIN = 32  # of the subspace that the smallest are told apart in
PUBLISHED_ROUNDS = 16  # of PiSSA's scripts


@dataclass(frozen=True)
class Triplets:
    """`u (d_out, n)`, `s (n)` descending, `v (n, d_in)`, in the matrix's type: `W = u diag(s) v` where n is all of them."""

    u: Tensor
    s: Tensor
    v: Tensor

    def balanced(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """`(A (n, d_in), B (d_out, n))` with `scale · B A = u diag(s) v`, each taking the root of `s / scale`."""
        root = (self.s / scale).sqrt()
        return root[:, None] * self.v, self.u * root


def largest(matrix: Tensor, count: int, generator: torch.Generator, rounds: int = PUBLISHED_ROUNDS) -> Triplets:
    """The `count` largest triplets by subspace iteration: products with the matrix only, of `count + 8` columns.

    Random numbers come from `generator` (CPU) alone. Where the iteration would span the whole space, it is an exact
    decomposition instead.
    """
    _refuse_nonfinite(matrix)
    width = count + OVERSAMPLING
    if width >= min(matrix.shape):
        return _first(every(matrix), count)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = _orthonormal(matrix @ start)
    for _ in range(rounds):
        basis = _orthonormal(matrix @ _orthonormal(matrix.t() @ basis))
    u, s, v = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return _first(_signed(basis @ u, s, v), count)


def every(matrix: Tensor) -> Triplets:
    """All `min(d_out, d_in)` triplets, by a full decomposition in the matrix's own type."""
    _refuse_nonfinite(matrix)
    return _signed(*torch.linalg.svd(matrix, full_matrices=False))


def largest_exact(matrix: Tensor, count: int) -> Triplets:
    return _first(every(matrix), count)


def smallest(matrix: Tensor, count: int) -> Triplets:
    """The `count` smallest triplets, refined in float64.

    A full decomposition in float64 would need some fifteen float32 copies of a square matrix. In float32 it needs six, and
    errs by about 1e-7 σ₁: enough to tell the small vectors from the others, and to correct them for what they still hold of
    the others (first-order perturbation theory, with products in float64).
    """
    if matrix.shape[0] < matrix.shape[1]:  # the vectors of the shorter side are the ones that span their space
        triplets = smallest(matrix.t(), count)
        return _signed(triplets.v.t().contiguous(), triplets.s, triplets.u.t().contiguous())
    _refuse_nonfinite(matrix)
    width = min(count + MARGIN, matrix.shape[1])
    _, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept, others, squares = v[-width:].t().double(), v[:-width], s.double().square()
    gaps = squares[:-width, None] - squares[None, -width:]
    for _ in range(2):
        overlap = _product(others, _product(matrix.t(), _product(matrix, kept)))
        weights = torch.where(gaps > _SAME * squares[0], overlap / gaps, 0.0)
        kept = _orthonormal(kept - _product(others.t(), weights))
    u, s, rotation = torch.linalg.svd(_product(matrix, kept), full_matrices=False)
    triplets = _signed(u, s, rotation @ kept.t())
    return Triplets(*(t.to(matrix.dtype) for t in (triplets.u[:, -count:], triplets.s[-count:], triplets.v[-count:])))


_SAME = 1.5e-14  # of σ₁²: gaps of squares that float32's σ cannot tell from none


def _first(triplets: Triplets, count: int) -> Triplets:
    """Copies, so that the rest can go."""
    return Triplets(triplets.u[:, :count].clone(), triplets.s[:count].clone(), triplets.v[:count].clone())


def _signed(u: Tensor, s: Tensor, v: Tensor) -> Triplets:
    """The entry of each u with the largest magnitude (the first of equals) becomes positive. In place: they are large."""
    places = u.abs().argmax(0)
    signs = torch.where(u.gather(0, places[None])[0] < 0, -1.0, 1.0).to(u.dtype)
    return Triplets(u.mul_(signs), s, v.mul_(signs[:, None]))


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


_ROWS = 256


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """`M x` in float64, without a float64 copy of the whole matrix."""
    return torch.cat([rows.double() @ x for rows in matrix.split(_ROWS)])


def _refuse_nonfinite(matrix: Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise UsageError("a frozen weight holds values that are not finite, so it has no singular vectors")
