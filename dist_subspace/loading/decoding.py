"""Weights that a file holds in codes, as the floats that they stand for: any rectangle, in the order of the file or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_subspace.loading.held_weight import HeldWeight, ReadBytes

CHUNK = 1 << 20  # entries that are decoded at a time: several copies of them are in memory


class Decoder:
    """Decodes what is asked for. What is asked for in another order than the file's is taken from whole matrices, which stay
    until others are asked for: the next piece is of the same."""

    def __init__(self, read: ReadBytes) -> None:
        self._read = read
        self._key: tuple[str, int, int] | None = None
        self._matrices = torch.empty(0)

    def fill(
        self, weight: HeldWeight, place: int, sizes: Sequence[int], strides: Sequence[int], target: Tensor
    ) -> None:
        """Values of a rectangle.

        Arguments:
            place: the flat entry of the weight, in the order of the file, that is the rectangle's first.
            sizes, strides: of the rectangle, in entries of the weight.
            target: of the shape `sizes`, in any type of floats.
        """
        if target.is_contiguous() and _is_one_run(sizes, strides):
            self._decode(weight, place, target.view(-1))
            return
        last = place + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        matrix = weight.shape[-2] * weight.shape[-1]
        first, stop = place // matrix * matrix, (last // matrix + 1) * matrix
        key = (weight.parts[0].key, first, stop)
        if self._key != key or self._matrices.dtype != target.dtype:
            self._key, self._matrices = None, torch.empty(0)  # the old ones go before the new ones come
            self._matrices = torch.empty(stop - first, dtype=target.dtype)
            self._decode(weight, first, self._matrices)
            self._key = key
        target.copy_(self._matrices.as_strided(tuple(sizes), tuple(strides), place - first))

    def _decode(self, weight: HeldWeight, start: int, target: Tensor) -> None:
        """Flat entries from `start` on."""
        stop = start + target.numel()
        for first in range(start, stop, CHUNK):
            end = min(first + CHUNK, stop)
            low = first // weight.unit * weight.unit
            high = min(-(-end // weight.unit) * weight.unit, weight.numel)
            target[first - start : end - start] = weight.values(self._read, low, high)[first - low : end - low]


def _is_one_run(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the entries lie one behind the other."""
    run = 1
    for size, stride in reversed(list(zip(sizes, strides, strict=True))):
        if size > 1 and stride != run:
            return False
        run *= size
    return True
