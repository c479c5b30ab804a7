"""Weights that a file holds in codes, as runs of the floats that they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_subspace.loading.held_weight import HeldWeight, ReadBytes

CHUNK = 1 << 20  # entries that are decoded at a time: several copies of them are in memory


def decoded(
    weight: HeldWeight, read: ReadBytes, interval: tuple[int, int], unit: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """The flat entries of an interval of the weight as the model holds it: where each chunk begins, and its values. Chunks but
    the last are multiples of `unit`. Of a weight that the file holds the other way round, whole matrices are decoded."""
    if not weight.turned:
        yield from _in_order(weight, read, interval, unit, dtype)
        return
    rows, columns = weight.shape[-2:]
    size = rows * columns
    for first in range(interval[0] // size * size, interval[1], size):
        matrix = torch.empty(columns, rows, dtype=dtype)
        for start, values in _in_order(weight, read, (first, first + size), columns, dtype):
            strip = values.view(-1, columns)
            row = (start - first) // columns
            matrix[:, row : row + len(strip)] = strip.t()
        low, high = max(interval[0], first), min(interval[1], first + size)
        yield low, matrix.view(-1)[low - first : high - first]


def _in_order(
    weight: HeldWeight, read: ReadBytes, interval: tuple[int, int], unit: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """The same in the order of the file."""
    step = max(1, CHUNK // unit) * unit
    for first in range(*interval, step):
        end = min(first + step, interval[1])
        low = first // weight.unit * weight.unit
        high = min(-(-end // weight.unit) * weight.unit, weight.numel)
        yield first, weight.values(read, low, high)[first - low : end - low].to(dtype)
