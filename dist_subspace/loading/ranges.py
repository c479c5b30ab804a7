"""Reading parts of the tensors of a checkpoint: ranges of bytes, into memory that is used again, every byte counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.loading.decoding import decoded
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.pages import zeros_in_pages

CHUNK = 1 << 22  # entries that are in memory at a time
# What can be read in parts, by safetensors' names.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class RangeReader:
    """Reads flat entries of a checkpoint's tensors. What it yields lies in one buffer, until the next is asked for."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._open: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._buffers: dict[str, Tensor] = {}  # of weights that several tensors hold, by what each of them is

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def entries(self, key: str, start: int, stop: int, unit: int) -> Iterator[tuple[int, Tensor]]:
        """The entries from `start` to `stop` of a tensor as it lies in the file: where each chunk begins, and its values. Chunks
        but the last are multiples of `unit`."""
        weight = self.index.held(key)
        if weight is not None:
            yield from decoded(weight, self.bytes, (start, stop), unit, self.index.dtype)
            return
        item = FLOATS[self.index.types[key]].itemsize
        for first, end in _chunks(start, stop, unit):
            held = self._room((end - first) * item)
            self._fill(key, first * item, held)
            yield first, held.view(FLOATS[self.index.types[key]])

    def transposed_entries(self, key: str, start: int, stop: int, unit: int) -> Iterator[tuple[int, Tensor]]:
        """The same of the transpose of a matrix `(rows, columns)`: its rows are columns of the file, whose rows are read."""
        weight = self.index.held(key)
        if weight is not None:
            turned = replace(weight, turned=not weight.turned)
            yield from decoded(turned, self.bytes, (start, stop), unit, self.index.dtype)
            return
        rows, columns = self.index.shapes[key]
        dtype = FLOATS[self.index.types[key]]
        for first, end in _chunks(start, stop, unit):
            left, right = first // rows, -(-end // rows)
            width = (right - left) * dtype.itemsize
            held = self._room(rows * width)
            for row in range(rows):
                self._fill(key, (row * columns + left) * dtype.itemsize, held[row * width : (row + 1) * width])
            flat = held.view(dtype).view(rows, right - left).t().reshape(-1)
            yield first, flat[first - left * rows : end - left * rows]

    def bytes(self, key: str, start: int, stop: int) -> Tensor:
        """Bytes `[start, stop)` of a tensor's values as they lie in the file, uint8 (`ReadBytes`)."""
        ending = key.rpartition(".")[2]
        held = self._buffers.get(ending, torch.empty(0, dtype=torch.uint8))
        if held.numel() < stop - start:
            del held
            self._buffers.pop(ending, None)
            held = self._buffers[ending] = zeros_in_pages(stop - start, torch.uint8)
        self._fill(key, start, held[: stop - start])
        return held[: stop - start]

    def _room(self, size: int) -> Tensor:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = zeros_in_pages(size, torch.uint8)
        return self._buffer[:size]

    def _fill(self, key: str, offset: int, held: Tensor) -> None:
        """Read the bytes of a tensor from `offset` on.

        Raises:
            UsageError: the file has become shorter, or the system cannot read it.
        """
        index = self.index.in_file
        file, place = index.files[key], index.spans[key][0] + offset
        view = memoryview(held.numpy())  # type: ignore[arg-type]
        done = 0
        try:
            descriptor = self._descriptor(file)
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], place + done)
                if count == 0:
                    raise UsageError(f"{file} is cut short: it ends within {key}; copy or download it again")
                done += count
        except OSError as error:
            raise UsageError(f"{file} cannot be read ({error.strerror}); copy or download it again") from error
        self.index.bytes_read.total += done

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]


def _chunks(start: int, stop: int, unit: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // unit) * unit
    return ((first, min(first + step, stop)) for first in range(start, stop, step))
