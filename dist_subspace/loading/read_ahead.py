"""A thread that reads what is wanted next while something is done with what came before: bounded, in order, and over with the
block that it was begun in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dist_subspace.loading.held_weight import HeldBytes
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.ranges import Buffer, RangeReader

T = TypeVar("T")
BUFFERS = 3  # one is worked on, one is ready, one is being filled


@dataclass(frozen=True)
class Wanted(Generic[T]):
    """The flat entries from `start` to `stop` of a tensor; what_for: handed back with them."""

    what_for: T
    layout: Layout | HeldBytes
    start: int
    stop: int


class ReadAhead(Generic[T]):
    """Yields what is wanted with its values, in order; the values stay until the next is asked for.

    Memory is `BUFFERS` times the largest piece, pinned where the values go to a GPU, so that copies need not wait. An error of
    the reader is raised where its piece would have come, and no piece after it.
    """

    def __init__(self, reader: RangeReader, wanted: Iterable[Wanted[T]], device: torch.device) -> None:
        self._reader, self._wanted, self._device = reader, wanted, device
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[Wanted[T], Tensor, _Buffer] | BaseException | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="reader of a checkpoint", daemon=True)

    def __enter__(self) -> ReadAhead[T]:
        for _ in range(BUFFERS):
            self._free.put(_Buffer(self._device))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._free.put(None)
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[Wanted[T], Tensor]]:
        while True:
            come = self._full.get()
            if come is None:
                return
            if isinstance(come, BaseException):
                raise come
            wanted, values, buffer = come
            yield wanted, values
            buffer.used()
            self._free.put(buffer)

    def _read(self) -> None:
        try:
            for wanted in self._wanted:
                buffer = self._free.get()
                if buffer is None or self._over.is_set():
                    return
                values = buffer.room(wanted.stop - wanted.start, self._reader.dtype(wanted.layout))
                self._reader.fill(wanted.layout, wanted.start, wanted.stop, values)
                self._full.put((wanted, values, buffer))
            self._full.put(None)
        except BaseException as error:  # is raised where it is waited for
            self._full.put(error)


class _Buffer:
    """A buffer that a GPU may read yet when the next piece of work is begun."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffer = Buffer(pinned=self._on_gpu)
        self._copied: torch.cuda.Event | None = None

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._buffer.room(numel, dtype)

    def used(self) -> None:
        """What has been asked for on the GPU so far is the last that reads the values."""
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
