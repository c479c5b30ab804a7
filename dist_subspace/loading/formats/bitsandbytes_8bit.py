"""bitsandbytes' 8 bits as `save_pretrained` writes them: `W.weight` int8 row by row, `W.SCB` the largest magnitude of each row.

Read against bitsandbytes 0.50.2 (`Linear8bitLt._save_to_state_dict`); `W.weight_format` 0 means row by row, the layouts of older
GPUs' kernels are no longer written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_subspace.loading.formats.registry import Files, Found, reads
from dist_subspace.loading.held_weight import AsHeld, HeldWeight, ReadBytes, Source, Stored
from dist_subspace.storage.bnb import dequantize_8bit

SCALE, FORMAT = ".SCB", ".weight_format"


@dataclass(frozen=True, kw_only=True)
class EightBitWeight(HeldWeight):
    """Codes and scales; a unit is a row."""

    def values(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        codes, scale = self.parts
        rows = codes.entries(read, start, stop).view(-1, self.unit)
        return dequantize_8bit(rows, scale.entries(read, start // self.unit, stop // self.unit)).view(-1)

    def as_held(self, storage: str) -> AsHeld | None:
        return self.rows_as_held(storage, 0, self.shape[0])

    def rows_as_held(self, storage: str, first: int, rows: int) -> AsHeld | None:
        if storage != self.storage:
            return None
        codes, scale = self.parts
        begins = {"codes": (codes, first * self.unit), "scale": (scale, first * 4)}
        return AsHeld({}, {name: _from(part, begin) for name, (part, begin) in begins.items()})


def _from(part: Stored, begin: int) -> Source:
    return lambda read, start, stop: part.as_bytes(read, begin + start, begin + stop)


@reads("bitsandbytes")
def find(files: Files, settings: Mapping[str, Any]) -> Found:
    found = Found()
    for key in files:
        if key.endswith(SCALE):
            stem = key.removesuffix(SCALE)
            found.weights[f"{stem}.weight"] = _weight(files, f"{stem}.weight", key)
            found.dropped |= {k for k in (f"{stem}{FORMAT}",) if k in files}
    for key in files:
        marked, codes = key.endswith(FORMAT), _is_codes(files, key)
        if (marked and key not in found.dropped) or (codes and key not in found.weights):
            stem = key.removesuffix(FORMAT).removesuffix(".weight")
            raise files.refusal(f"lack {stem}{SCALE}, without which {stem}.weight means nothing")
    return found


def _is_codes(files: Files, key: str) -> bool:
    """Whether it is a matrix of bytes, and not one of 4 bits that is kept as such."""
    return key.endswith(".weight") and files.index.types[key] == "I8" and f"{key}.absmax" not in files


def _weight(files: Files, weight: str, key: str) -> EightBitWeight:
    codes = files.stored(weight, weight)
    if len(codes.shape) != 2:
        raise files.refusal(f"hold {weight} with {len(codes.shape)} sides; expected 2")
    files.check(codes, (torch.int8,), codes.numel)
    scale = files.check(files.stored(key, weight), (torch.float32,), codes.shape[0])
    marked = f"{weight.removesuffix('.weight')}{FORMAT}"
    if marked in files and files.check(files.stored(marked, weight), (torch.uint8,), 1).whole(files.read).any():
        raise files.refusal(
            f"hold {weight} in the order of an older GPU kernel ({marked}); save it again with bitsandbytes 0.45"
        )
    return EightBitWeight(
        kind="bitsandbytes int8", parts=(codes, scale), shape=codes.shape, unit=codes.shape[1], storage="int8"
    )
