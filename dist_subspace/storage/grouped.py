"""Products of sorted rows with the matrices of several experts in one call, where the device has a kernel for that.

A GPU is idle between the small products of a loop over experts. `torch.nn.functional.grouped_mm` wants strides of whole 16 bytes:
matrices and rows of other widths are padded with zeros. On a CPU it is itself a loop, with more matrices in memory: there the
products stay one by one (tests/benchmarks/experts.py shows both).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_subspace.linear_map import grouped_mm, has_grouped_kernel, product_type

AT_ONCE = 8  # matrices that are decoded at once
ALIGNED = 16  # bytes

# An expert's number, and its rows.
Hit = tuple[int, slice]
# An expert's matrix `(d_out, d_in)` in a type, and one factor a row of it, or None (`FrozenLinear.entries`).
Entries = Callable[[int, torch.dtype], tuple[Tensor, Tensor | None]]


def in_groups(x: Tensor) -> bool:
    """Whether the device of x has a kernel for the products of several matrices in the type that products with x run in."""
    return has_grouped_kernel(x.device, product_type(x))


def grouped_products(
    x: Tensor, hits: Sequence[Hit], shape: tuple[int, int], entries: Entries, *, at_once: int, back: bool = False
) -> Tensor:
    """`x_e W_e^T` for the rows of each expert, `(rows, d_out)`, or `x_e W_e`, `(rows, d_in)`, where `back`; without autograd.

    Arguments:
        x: `(rows, d_in)`, or `(rows, d_out)` where `back`; rows of no expert give zeros.
        hits: the experts that have rows, in the order of these, which touch.
        shape: `(d_out, d_in)`.
        at_once: how many matrices are decoded at once.
    """
    kind = product_type(x)
    y = x.new_zeros(x.shape[0], shape[1] if back else shape[0])
    buffer = x.new_zeros((min(at_once, len(hits)), *(_aligned(side, kind) for side in shape)), dtype=kind)
    for first in range(0, len(hits), at_once):
        some = hits[first : first + at_once]
        start, stop = some[0][1].start, some[-1][1].stop
        matrices, given = buffer[: len(some)], x[start:stop].to(kind)
        factors = [_decode(entries(number, kind), matrix) for (number, _), matrix in zip(some, matrices, strict=True)]
        own = [slice(rows.start - start, rows.stop - start) for _, rows in some]
        if back:
            given = _scaled(given, own, factors, copy=given.data_ptr() == x[start:stop].data_ptr())
        made = multiply(given, matrices if back else matrices.transpose(1, 2), [rows.stop for rows in own])
        if not back:
            made = _scaled(made, own, factors)
        y[start:stop] = made[:, : y.shape[1]]
    return y


def multiply(x: Tensor, matrices: Tensor, ends: Sequence[int]) -> Tensor:
    """`x_g M_g` for the rows of each group g, which end at `ends`; `M (groups, in, out)` has strides of whole 16 bytes, and more
    rows than x has columns where it was padded."""
    wide = functional.pad(x, (0, matrices.shape[1] - x.shape[1])).contiguous()
    return grouped_mm(wide, matrices, torch.tensor(ends, dtype=torch.int32, device=x.device))


def is_aligned(matrices: Tensor) -> bool:
    """Whether `(experts, rows, columns)`, which may be transposed, can be multiplied with as it is."""
    size, (_, rows, columns) = matrices.element_size(), matrices.stride()
    return matrices.data_ptr() % ALIGNED == 0 and 1 in (rows, columns) and max(rows, columns) * size % ALIGNED == 0


def _aligned(side: int, kind: torch.dtype) -> int:
    step = ALIGNED // kind.itemsize
    return -(-side // step) * step


def _decode(entries: tuple[Tensor, Tensor | None], into: Tensor) -> Tensor | None:
    matrix, factors = entries
    into[: matrix.shape[0], : matrix.shape[1]] = matrix
    return factors


def _scaled(y: Tensor, own: Sequence[slice], factors: Sequence[Tensor | None], copy: bool = False) -> Tensor:
    """Each expert's rows, which are its own to write over unless `copy`, times its factors."""
    if all(factor is None for factor in factors):
        return y
    y = y.clone() if copy else y
    for rows, factor in zip(own, factors, strict=True):
        if factor is not None:
            y[rows, : factor.numel()].mul_(factor)
    return y
