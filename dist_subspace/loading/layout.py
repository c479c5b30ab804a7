"""Where the values of a tensor lie in a checkpoint, when it is a tensor of the file, or is put together of pieces of several.

A tensor that transformers makes by stacking, joining, cutting and transposing (experts that are fused, a projection that is
split) is a set of boxes, each a piece of one tensor of the file seen through strides. So any range of it is read by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Values of one tensor of a checkpoint in their place.

    start, shape: the box in the tensor that is put together. key: the tensor of the checkpoint; offset: which of its flat entries
    is the box's first; strides: how far apart neighbours of each dimension lie there, in entries.
    """

    key: str
    start: Shape
    shape: Shape
    offset: int
    strides: Shape


@dataclass(frozen=True)
class Layout:
    """A tensor of `shape` that is put together of boxes, which cover it and do not meet."""

    shape: Shape
    boxes: tuple[Box, ...]

    @staticmethod
    def of(key: str, shape: Sequence[int]) -> Layout:
        """A tensor of the checkpoint as it is."""
        whole = tuple(shape)
        return Layout(whole, (Box(key, (0,) * len(whole), whole, 0, row_strides(whole)),))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(box.key for box in self.boxes))

    @property
    def is_turned(self) -> bool:
        """Whether neighbours of a row are not neighbours in the file."""
        return any(_last_stride(box) != 1 for box in self.boxes)

    @property
    def is_in_runs(self) -> bool:
        """Whether some dimension's neighbours are neighbours in the file, so that more than one entry is read at a time."""
        return all(prod(box.shape) <= 1 or 1 in _real(box.shape, box.strides) for box in self.boxes)

    def permute(self, dims: Sequence[int]) -> Layout:
        def turned(values: Shape) -> Shape:
            return tuple(values[dim] for dim in dims)

        boxes = tuple(
            Box(box.key, turned(box.start), turned(box.shape), box.offset, turned(box.strides)) for box in self.boxes
        )
        return Layout(turned(self.shape), boxes)

    def transpose(self, one: int, other: int) -> Layout:
        dims = list(range(len(self.shape)))
        dims[one], dims[other] = dims[other], dims[one]
        return self.permute(dims)

    def narrow(self, dim: int, start: int, length: int) -> Layout:
        """The entries of a dimension from `start` on."""
        dim, boxes = dim % len(self.shape), []
        for box in self.boxes:
            low, high = max(start, box.start[dim]), min(start + length, box.start[dim] + box.shape[dim])
            if low < high:
                offset = box.offset + (low - box.start[dim]) * box.strides[dim]
                at, size = _put(box.start, dim, low - start), _put(box.shape, dim, high - low)
                boxes.append(replace(box, start=at, shape=size, offset=offset))
        return Layout(_put(self.shape, dim, length), tuple(boxes))

    def squeeze(self, dim: int) -> Layout:
        """Without a dimension of one entry."""
        dim %= len(self.shape)

        def without(values: Shape) -> Shape:
            return (*values[:dim], *values[dim + 1 :])

        boxes = (
            replace(box, start=without(box.start), shape=without(box.shape), strides=without(box.strides))
            for box in self.boxes
        )
        return Layout(without(self.shape), tuple(boxes))

    def unsqueeze(self, dim: int) -> Layout:
        """With one more dimension, of one entry."""
        dim %= len(self.shape) + 1

        def more(values: Shape, value: int) -> Shape:
            return (*values[:dim], value, *values[dim:])

        boxes = (
            replace(box, start=more(box.start, 0), shape=more(box.shape, 1), strides=more(box.strides, 0))
            for box in self.boxes
        )
        return Layout(more(self.shape, 1), tuple(boxes))

    @staticmethod
    def cat(layouts: Sequence[Layout], dim: int) -> Layout:
        """Joined along a dimension."""
        first = layouts[0].shape
        dim, boxes, place = dim % len(first), list[Box](), 0
        for layout in layouts:
            boxes += (replace(box, start=_put(box.start, dim, box.start[dim] + place)) for box in layout.boxes)
            place += layout.shape[dim]
        return Layout(_put(first, dim, place), tuple(boxes))

    def view(self, shape: Shape) -> Layout:
        """The same entries in another shape.

        Raises:
            ValueError: of what is not one piece of the file.
        """
        (box,) = self.boxes
        if box.shape != self.shape or _real(box.shape, box.strides) != _real(self.shape, row_strides(self.shape)):
            raise ValueError(f"a tensor {self.shape} with strides {box.strides} cannot be seen as {shape}")
        return Layout(shape, (Box(box.key, (0,) * len(shape), shape, box.offset, row_strides(shape)),))


def row_strides(shape: Sequence[int]) -> Shape:
    """How far apart neighbours of each dimension lie in a tensor that is written row by row."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Shape, Shape]]:
    """The flat entries from `start` to `stop` of a tensor, as rectangles of it one after the other: the flat place of each, its
    corner and its sizes."""
    if start >= stop:
        return
    if not shape:
        yield start, (), ()
        return
    inner = prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first < last and start == first * inner:
        full = stop // inner - first
        yield start, (first, *(0,) * len(shape[1:])), (full, *shape[1:])
        yield from rectangles(shape, start + full * inner, stop)
        return
    end = min(stop, (first + 1) * inner)
    if start == first * inner and end == start + inner:
        yield start, (first, *(0,) * len(shape[1:])), (1, *shape[1:])
    else:
        for place, corner, sizes in rectangles(shape[1:], start - first * inner, end - first * inner):
            yield place + first * inner, (first, *corner), (1, *sizes)
    yield from rectangles(shape, end, stop)


def _put(values: Shape, dim: int, value: int) -> Shape:
    return (*values[:dim], value, *values[dim + 1 :])


def _real(shape: Shape, strides: Shape) -> Shape:
    """The strides of the dimensions that have more than one entry."""
    return tuple(stride for size, stride in zip(shape, strides, strict=True) if size > 1)


def _last_stride(box: Box) -> int:
    return (_real(box.shape, box.strides) or (1,))[-1]
