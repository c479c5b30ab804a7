"""MXFP4, the experts of gpt-oss: `W_blocks` `(experts, d_out, groups, 16)` uint8, two numbers of 4 bits a byte, the earlier one
in the lower half, and `W_scales` `(experts, d_out, groups)` uint8, the exponents of 2 of each group of 32.

Read against transformers 5.23.0 (`integrations/mxfp4.py`). The model holds `(experts, d_in, d_out)`. Every value is exact in
bfloat16. The format is that of the Open Compute Project's Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_subspace.loading.formats.registry import Files, Found, reads
from dist_subspace.loading.held_weight import HeldWeight, ReadBytes

GROUP = 32
# One sign, two bits of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, kw_only=True)
class Mxfp4Weight(HeldWeight):
    """Blocks and scales; a unit is a group."""

    def values(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        blocks, scales = self.parts
        exponents = scales.entries(read, start // GROUP, stop // GROUP).int() - 127
        numbers = unpacked(blocks.entries(read, start // 2, stop // 2)).view(-1, GROUP)
        return torch.ldexp(numbers, exponents[:, None]).view(-1)


def unpacked(pairs: Tensor) -> Tensor:
    """The numbers that bytes stand for, two each, the lower half first: float32, twice as many along the last side."""
    pairs = pairs.view(torch.uint8)
    halves = torch.stack((pairs.bitwise_and(15), pairs.bitwise_right_shift(4)), dim=-1)
    return torch.tensor(VALUES)[halves.int()].flatten(-2)


@reads("mxfp4")
def find(files: Files, settings: Mapping[str, Any]) -> Found:
    found = Found()
    for key in files:
        if key.endswith("_blocks"):
            weight = key.removesuffix("_blocks")
            found.weights[weight] = _weight(files, weight, key)
        elif key.endswith("_scales") and f"{key.removesuffix('_scales')}_blocks" not in files:
            raise files.refusal(f"lack {key.removesuffix('_scales')}_blocks, without which {key} means nothing")
    return found


def _weight(files: Files, weight: str, key: str) -> Mxfp4Weight:
    blocks, scales = files.stored(key, weight), files.stored(f"{weight}_scales", weight)
    *lead, groups, width = blocks.shape if len(blocks.shape) > 2 else (0, 0, 0)
    if width != GROUP // 2:
        raise files.refusal(f"hold {key} with shape {list(blocks.shape)}; expected (..., groups, {GROUP // 2})")
    files.check(blocks, (torch.uint8,), blocks.numel)
    files.check(scales, (torch.uint8,), blocks.numel // width)
    if scales.shape != (*lead, groups):
        raise files.refusal(f"hold {scales.key} with shape {list(scales.shape)}; expected {[*lead, groups]}")
    return Mxfp4Weight(kind="MXFP4", parts=(blocks, scales), shape=(*lead, groups * GROUP), unit=GROUP, turned=True)
