"""A model's weights written one tensor at a time: safetensors files of a bounded size, and their index. Local, rank 0.

The library's own writer wants all tensors of a file at once. The format is a length, a JSON header that says where each
tensor lies, and the bytes; shapes and types are known before the first byte, so the header can go first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_subspace.atomic_files import sync
from dist_subspace.errors import UsageError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECE = 1 << 22  # elements that are converted at a time
_TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its key, shape and type in the file."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightsWriter:
    """Files of at most `max_shard_bytes` (a larger tensor has one of its own), written in the order of the plan."""

    def __init__(self, folder: Path, plan: Sequence[Planned], max_shard_bytes: int) -> None:
        self.folder = folder
        self.shards = _shards(plan, max_shard_bytes)
        self.names = [SINGLE]
        if len(self.shards) > 1:
            total = len(self.shards)
            self.names = [f"model-{n + 1:05d}-of-{total:05d}.safetensors" for n in range(total)]
        self._places = [(n, tensor) for n, shard in enumerate(self.shards) for tensor in shard]
        self._next = 0
        self._file: BinaryIO | None = None

    def write(self, key: str, tensor: Tensor) -> None:
        """The next tensor of the plan, in any float type where the plan has one.

        Raises:
            UsageError: a value that is finite has no finite value in the plan's type.
        """
        shard, planned = self._places[self._next]
        if planned.key != key or tuple(tensor.shape) != planned.shape:
            raise RuntimeError(f"{key} {tuple(tensor.shape)} is written where {planned} was planned")
        if self._next == 0 or self._places[self._next - 1][0] != shard:
            self._close()
            self._file = (self.folder / self.names[shard]).open("wb")
            self._file.write(_header(self.shards[shard]))
        for piece in _pieces(tensor, planned):
            self._file.write(memoryview(piece.numpy()))  # type: ignore[union-attr,arg-type]
        self._next += 1

    def finish(self) -> None:
        """The files are on disk, can be read, and have an index where there are several."""
        self._close()
        if self._next != len(self._places):
            raise RuntimeError(f"{self._places[self._next][1].key} was planned and not written")
        for name, shard in zip(self.names, self.shards, strict=True):
            _check(self.folder / name, shard)
        if len(self.names) > 1:
            placed = {t.key: name for name, shard in zip(self.names, self.shards, strict=True) for t in shard}
            sizes = [t.bytes for shard in self.shards for t in shard]
            numels = [torch.Size(t.shape).numel() for shard in self.shards for t in shard]
            index = {"metadata": {"total_parameters": sum(numels), "total_size": sum(sizes)}, "weight_map": placed}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            sync(self.folder / INDEX)

    def abandon(self) -> None:
        """Let go of the open file; the folder is about to be removed."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _shards(plan: Sequence[Planned], most: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _header(shard: Sequence[Planned]) -> bytes:
    """The length of the JSON in 8 bytes, and the JSON, filled up with blanks to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.bytes
        entries[tensor.key] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: Tensor, planned: Planned) -> Iterator[Tensor]:
    """The tensor's bytes on the CPU, a piece at a time: a whole copy in another type would be as large as a layer."""
    flat = tensor.detach().contiguous().view(-1)
    for start in range(0, flat.numel(), PIECE):
        source = flat[start : start + PIECE]
        piece = source.to(device="cpu", dtype=planned.dtype)
        if piece.dtype != source.dtype and not bool((piece.isfinite() | ~source.isfinite().to("cpu")).all()):
            raise UsageError(
                f"{planned.key} has values that {str(planned.dtype).removeprefix('torch.')} cannot hold; accepted: a wider dtype"
            )
        yield piece.view(torch.uint8)


def _check(file: Path, shard: Sequence[Planned]) -> None:
    """A file that was cut short, by whatever means, is an error now and not when somebody loads it."""
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            keys = set(handle.keys())
    except SafetensorError as error:
        raise OSError(f"{file} does not read back as it was written ({error})") from error
    if keys != {t.key for t in shard}:
        raise OSError(f"{file} does not hold the tensors that were written to it")
