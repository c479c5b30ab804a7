"""Reading parts of the tensors of a checkpoint: ranges of bytes, into memory that is used again, every byte counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from math import lcm, prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dist_subspace.loading.decoding import Decoder
from dist_subspace.loading.held_weight import TYPES, HeldBytes
from dist_subspace.loading.index import CheckpointIndex, read_fully, unreadable
from dist_subspace.loading.layout import Box, Layout, Shape, rectangles
from dist_subspace.pages import zeros_in_pages

CHUNK = 1 << 20  # entries that are read at a time
# What can be read in parts, by safetensors' names.
FLOATS = {name: kind for name, kind in TYPES.items() if name not in ("U8", "I8", "F8_E8M0")}


class RangeReader:
    """Reads flat entries of tensors that are tensors of a checkpoint, or are put together of them. For one thread at a time."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._open: dict[Path, int] = {}
        self._buffer, self._turned = Buffer(), Buffer()
        self._parts: dict[str, Buffer] = {}  # of weights that several tensors hold, by what each of them is
        self._decoder = Decoder(self.bytes)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def dtype(self, layout: Layout | HeldBytes) -> torch.dtype:
        """The type in the file, which is one for all that a tensor is put together of."""
        if isinstance(layout, HeldBytes):
            return torch.int8
        return FLOATS[self.index.types[layout.boxes[0].key]]

    def entries(self, layout: Layout | HeldBytes, start: int, stop: int, unit: int) -> Iterator[tuple[int, Tensor]]:
        """The entries from `start` to `stop`: where each chunk begins, and its values, which lie in one buffer until the next is
        asked for. Chunks but the last are multiples of `unit`."""
        dtype = self.dtype(layout)
        for first, end in chunks(layout, start, stop, unit):
            values = self._buffer.room(end - first, dtype)
            self.fill(layout, first, end, values)
            yield first, values

    def fill(self, layout: Layout | HeldBytes, start: int, stop: int, values: Tensor) -> None:
        """Read the flat entries from `start` to `stop` into `values`, which is of the file's type and has so many.

        Raises:
            UsageError: a file has become shorter, or the system cannot read it.
        """
        if isinstance(layout, HeldBytes):
            values.copy_(layout.source(self.bytes, start, stop))
            return
        for place, corner, sizes in rectangles(layout.shape, start, stop):
            part = values[place - start : place - start + prod(sizes)].view(sizes)
            ends = tuple(at + size for at, size in zip(corner, sizes, strict=True))
            for box in layout.boxes:
                low = tuple(map(max, corner, box.start))
                high = tuple(min(end, at + size) for end, at, size in zip(ends, box.start, box.shape, strict=True))
                if all(one < other for one, other in zip(low, high, strict=True)):
                    inside = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, corner, strict=True))
                    self._read(box, low, high, part[inside])

    def _read(self, box: Box, low: Shape, high: Shape, target: Tensor) -> None:
        """A rectangle of a box, run by run, in the order of the file; turned where that is another one."""
        sizes = [end - at for at, end in zip(low, high, strict=True)]
        place = box.offset + sum(map(lambda at, begin, stride: (at - begin) * stride, low, box.start, box.strides))
        weight = self.index.held(box.key)
        if weight is not None:
            self._decoder.fill(weight, place, sizes, box.strides, target)
            return
        dims = [dim for dim, size in enumerate(sizes) if size > 1]
        order = sorted(dims, key=lambda dim: -box.strides[dim])
        outer, run = list(order), 1
        while outer and box.strides[outer[-1]] == run:
            run *= sizes[outer.pop()]
        direct = order == dims and target.is_contiguous()
        memory = target.reshape(-1) if direct else self._turned.room(prod(sizes), target.dtype)
        item = target.dtype.itemsize
        view = memoryview(memory.view(torch.uint8).numpy())  # type: ignore[arg-type]
        steps = product(*(range(sizes[dim]) for dim in outer))
        for number, step in enumerate(steps):
            at = place + sum(map(lambda dim, count: box.strides[dim] * count, outer, step))
            self._bytes(box.key, at * item, view[number * run * item : (number + 1) * run * item])
        if not direct:
            turned = memory.view([sizes[dim] for dim in order]).permute([order.index(dim) for dim in dims])
            target[tuple(0 if size == 1 else slice(None) for size in sizes)].copy_(turned)

    def bytes(self, key: str, start: int, stop: int) -> Tensor:
        """Bytes `[start, stop)` of the values of a tensor of the file, uint8 (`ReadBytes`)."""
        held = self._parts.setdefault(key.rpartition(".")[2], Buffer()).room(stop - start, torch.uint8)
        self._bytes(key, start, memoryview(held.numpy()))  # type: ignore[arg-type]
        return held

    def _bytes(self, key: str, offset: int, view: memoryview) -> None:
        """Read the bytes of a tensor of the file from `offset` on."""
        index = self.index.in_file
        file, place = index.files[key], index.spans[key][0] + offset
        try:
            read_fully(self._descriptor(file), place, view, file, key)
        except OSError as error:
            raise unreadable(file, error) from error
        self.index.bytes_read.total += len(view)

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]


class Buffer:
    """Memory that is used again and again, as much as was asked for at most. pinned: where a GPU reads it by itself."""

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        size = numel * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True) if self.pinned else None
            self._bytes = zeros_in_pages(size, torch.uint8) if pinned is None else pinned
        return self._bytes[:size].view(dtype)


def chunks(layout: Layout | HeldBytes, start: int, stop: int, unit: int) -> Iterator[tuple[int, int]]:
    """The entries from `start` to `stop` in pieces that are multiples of `unit`, but for the last. Those of a turned tensor end
    with its rows: they are columns of the file, and a part of one is read entry by entry."""
    row = lcm(unit, layout.shape[-1]) if layout.is_turned else unit
    block = row if row <= CHUNK and start % unit == 0 else unit
    step, first = max(1, CHUNK // block) * block, start
    while first < stop:
        end = min(stop, first + step - (first % block if block > unit else 0))
        yield first, end
        first = end
