"""FP8: float8 codes, and scales that they are multiplied with: one a block (DeepSeek, Qwen), a row, a column or a tensor.

Beside them some makers (DeepSeek-V4) hold the experts in 4 bits: `W.weight` int8 `(rows, columns / 2)`, two numbers a byte as in
MXFP4, and one scale for each 32 of a row.

Read against transformers 5.23.0 (`integrations/finegrained_fp8.py`: `W.weight_scale_inv`, whatever its name says, is a factor;
`integrations/compressed_tensors.py`, `integrations/fbgemm_fp8.py`: `W.weight_scale`). A value is the product in float32. Where a
side is no multiple of the block's, the last block is the shorter one, as in transformers' own layer `FP8Linear`; its dequantising
load takes the sides of the grid of scales as divisors instead, which is refused there, or gives other numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_subspace.loading.formats.mxfp4 import GROUP, unpacked
from dist_subspace.loading.formats.registry import Files, Found, method_of, reads
from dist_subspace.loading.held_weight import AsHeld, HeldWeight, ReadBytes
from dist_subspace.storage.raw import float8_numbers

CODES = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F32", "F16", "BF16")
BLOCK = 128  # rows and columns of the storage's blocks
# Of activations and of caches: they change no weight.
OF_ACTIVATIONS = re.compile(r"(^|[._])(input_scale|activation_scale|input_zero_point|[kvq]_scale|output_scale)$")
OF_WEIGHTS = re.compile(r"(_scale_inv|\.weight_scale|\.weight_zero_point|\.weight_packed|\.weight_global_scale)$")


@dataclass(frozen=True, kw_only=True)
class Fp8Weight(HeldWeight):
    """Codes and scales; a unit is a row. block: rows and columns that share a scale."""

    block: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of scales, of each matrix."""
        return math.ceil(self.shape[-2] / self.block[0]), math.ceil(self.shape[-1] / self.block[1])

    def values(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        (rows, columns), (high, wide), across = self.shape[-2:], self.block, self.grid[1]
        numbers = float8_numbers(self.parts[0].entries(read, start, stop)).view(-1, columns)
        row = torch.arange(start // columns, stop // columns)  # of all matrices, one below the other
        at = row // rows * self.grid[0] + row % rows // high
        low, top = int(at[0]), int(at[-1]) + 1
        scale = _factors(self.parts[1].entries(read, low * across, top * across)).view(-1, across)[at - low]
        return numbers.mul_(scale if across == 1 else _spread(scale, wide, columns)).view(-1)

    def as_held(self, storage: str) -> AsHeld | None:
        return self.rows_as_held(storage, 0, self.shape[0]) if len(self.shape) == 2 else None

    def rows_as_held(self, storage: str, first: int, rows: int) -> AsHeld | None:
        (high, wide), (height, columns) = self.block, self.shape[-2:]
        one_scale_a_block = (high % BLOCK == 0 or high >= height) and (wide % BLOCK == 0 or wide >= columns)
        whole_blocks = first % height % BLOCK == 0 and first % height + rows <= height
        plain = self.parts[0].dtype == torch.float8_e4m3fn and not self.turned
        if storage != "fp8" or not one_scale_a_block or not whole_blocks or not plain:
            return None
        begin = first * columns

        def codes(read: ReadBytes, start: int, stop: int) -> Tensor:
            return self.parts[0].as_bytes(read, begin + start, begin + stop)

        return AsHeld({}, {"codes": codes, "scale": partial(self._scale_bytes, first)})

    def _scale_bytes(self, first: int, read: ReadBytes, start: int, stop: int) -> Tensor:
        """Bytes of the float32 scales of the storage's blocks, row by row of blocks, from the row `first` of the weight on."""
        (high, wide), across = self.block, math.ceil(self.shape[-1] / BLOCK)
        number = torch.arange(start // 4, -(-stop // 4))
        row = number // across * BLOCK + first % self.shape[-2]
        at = first // self.shape[-2] * self.grid[0] + row // high
        low, top = int(at[0]) * self.grid[1], (int(at[-1]) + 1) * self.grid[1]
        column = number % across * BLOCK // wide
        scales = _factors(self.parts[1].entries(read, low, top))[at * self.grid[1] + column - low]
        return scales.view(torch.int8)[start % 4 :][: stop - start]


@dataclass(frozen=True, kw_only=True)
class Fp4Weight(HeldWeight):
    """Codes, two a byte, and scales; a unit is a group, which has one scale."""

    def values(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        codes, scale = self.parts
        numbers = unpacked(codes.entries(read, start // 2, stop // 2)).view(-1, GROUP)
        return numbers.mul_(_factors(scale.entries(read, start // GROUP, stop // GROUP))[:, None]).view(-1)


def _factors(scales: Tensor) -> Tensor:
    """float32; a byte is an exponent of 2 (E8M0)."""
    return scales.float().sub_(127).exp2_() if scales.dtype == torch.uint8 else scales.float()


def _spread(scale: Tensor, wide: int, columns: int) -> Tensor:
    return scale.repeat_interleave(wide, dim=1)[:, :columns]


@reads("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors")
def find(files: Files, settings: Mapping[str, Any]) -> Found:
    found = Found()
    blocks = list(_blocks(files, settings))
    for key in files:
        if OF_ACTIVATIONS.search(key):
            found.dropped.add(key)
        elif files.index.types[key] in CODES:
            found.weights[key] = _weight(files, key, blocks)
        elif _is_fp4(files, key, settings):
            found.weights[key] = _fp4_weight(files, key)
        elif files.index.types[key] not in FLOATS and _scale_key(files, key) in files:
            raise files.refusal(
                f"hold {key} as {files.index.types[key]}, beside {_scale_key(files, key)}: not FP8 but fewer bits, which are not "
                "read here; give the 16-bit model that it was made of"
            )
    used = {part.key for weight in found.weights.values() for part in weight.parts} | found.dropped
    for key in files:
        if OF_WEIGHTS.search(key) and key not in used:
            raise files.refusal(f"hold {key}, but no float8 weight that it belongs to; accepted: {' and '.join(CODES)}")
    if found.dropped:
        found.notes.append(
            f"{files.index.folder} holds scales for activations ({min(found.dropped)} and {len(found.dropped) - 1} more), which "
            "are not used: activations are not quantised here"
        )
    return found


def _weight(files: Files, key: str, blocks: list[tuple[int, int]]) -> Fp8Weight:
    codes = files.stored(key, key)
    scale = files.stored(_scale_key(files, key), key)
    if len(codes.shape) < 2 or scale.dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        raise files.refusal(
            f"hold {key} {list(codes.shape)} with {scale.key} as {scale.dtype}; expected a matrix and floats"
        )
    block = _block_of(codes.shape, scale.shape, blocks)
    if block is None:
        expected = (
            [math.ceil(side / part) for side, part in zip(codes.shape[-2:], blocks[0])] if blocks else "one scale"
        )
        raise files.refusal(
            f"hold {scale.key} with shape {list(scale.shape)}, which does not fit {key} {list(codes.shape)}; expected "
            f"{expected}; the checkpoint is damaged, or config.json is another's"
        )
    weight = Fp8Weight(kind="FP8", parts=(codes, scale), shape=codes.shape, unit=codes.shape[-1], block=block)
    return weight if weight.as_held("fp8") is None else replace(weight, storage="fp8")


def _is_fp4(files: Files, key: str, settings: Mapping[str, Any]) -> bool:
    """Whether it is a matrix of bytes whose scales are those of groups of 32 numbers of 4 bits."""
    scale, shape = _scale_key(files, key), files.index.shapes[key]
    if method_of(settings) != "fp8" or files.index.types[key] != "I8" or len(shape) < 2 or scale not in files:
        return False
    return files.index.shapes[scale] == (*shape[:-1], shape[-1] * 2 // GROUP) and shape[-1] * 2 % GROUP == 0


def _fp4_weight(files: Files, key: str) -> Fp4Weight:
    codes, scale = files.stored(key, key), files.stored(_scale_key(files, key), key)
    files.check(scale, (torch.uint8, torch.float8_e8m0fnu, torch.float32, torch.bfloat16), scale.numel)
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    return Fp4Weight(kind="FP4", parts=(codes, scale), shape=shape, unit=GROUP)


def _scale_key(files: Files, key: str) -> str:
    stem = key.removesuffix("weight")
    names = (f"{key}_scale_inv", f"{key}_scale", f"{stem}scale", f"{stem}qscale_weight")
    return next((name for name in names if name in files), names[0])


def _block_of(codes: tuple[int, ...], scales: tuple[int, ...], blocks: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None where the shapes do not fit together."""
    *lead, rows, columns = codes
    for high, wide in blocks:
        if scales == (*lead, math.ceil(rows / high), math.ceil(columns / wide)):
            return high, wide
    if math.prod(scales) == math.prod(lead):
        return rows, columns
    if scales in ((*lead, rows, 1), (*lead, rows)):
        return 1, columns
    return (rows, 1) if scales == (*lead, 1, columns) else None


def _blocks(files: Files, settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Rows and columns of the blocks that the settings name.

    Raises:
        UsageError: weights of compressed-tensors that are no float8.
    """
    if method_of(settings) != "compressed-tensors":
        given = settings.get("weight_block_size", None if method_of(settings) == "fbgemm_fp8" else (128, 128))
        if given is not None:
            yield int(given[0]), int(given[1])
        return
    for group in (settings.get("config_groups") or {}).values():
        weights, format_ = group.get("weights") or {}, group.get("format") or settings.get("format")
        if weights.get("type") != "float" or weights.get("num_bits") != 8:
            raise files.refusal(
                f"are compressed-tensors of {weights.get('num_bits')} bits ({format_}), which are not read; accepted of "
                "compressed-tensors: float-quantized with 8 bits; else give the 16-bit model that it was made of"
            )
        structure = weights.get("block_structure")
        if structure:
            high, wide = structure.split("x") if isinstance(structure, str) else structure
            yield int(high), int(wide)
        if weights.get("group_size"):
            yield 1, int(weights["group_size"])
