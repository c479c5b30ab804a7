"""bitsandbytes' 4 bits as `save_pretrained` writes them: the state of a `Params4bit` beside its bytes.

Read against bitsandbytes 0.50.2 (`QuantState.as_dict`): `W.weight` the codes, in whatever type `bnb_4bit_quant_storage` is;
`W.weight.absmax` one number a block, a byte where these are quantised too; `W.weight.quant_map` the 16 values;
`W.weight.nested_absmax` and `W.weight.nested_quant_map`; `W.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) JSON as bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_subspace.loading.formats.registry import Files, Found, reads
from dist_subspace.loading.held_weight import AsHeld, HeldWeight, ReadBytes
from dist_subspace.storage.bnb import (
    NESTED_BLOCKSIZE,
    Packed4bit,
    dequantize_4bit,
    four_bit_map,
    nested_map,
    plain_absmax,
)

STATE = ".quant_state.bitsandbytes__"
BESIDE = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+)$")


@dataclass(frozen=True, kw_only=True)
class FourBitWeight(HeldWeight):
    """Codes, absmax, and the absmax of the absmax where there is one."""

    quant_type: str
    blocksize: int
    offset: float

    def values(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        first, last = start // self.blocksize, -(-stop // self.blocksize)
        codes = read(self.parts[0].key, start // 2, -(-stop // 2))
        absmax = self.parts[1].entries(read, first, last)
        nested = None
        if len(self.parts) > 2:  # a unit is a whole block of the nested quantisation
            nested = self.parts[2].entries(read, first // NESTED_BLOCKSIZE, -(-last // NESTED_BLOCKSIZE))
        packed = Packed4bit(codes, absmax, nested, self.offset, self.blocksize, self.quant_type, (1, stop - start))
        return dequantize_4bit(packed, torch.float32).view(-1)

    def as_held(self, storage: str) -> AsHeld | None:
        if storage != self.quant_type:
            return None
        options = {"double_quant": len(self.parts) > 2, "blocksize": self.blocksize}
        names = ("codes", "absmax", "nested_absmax")
        plain = {"offset": self.offset} if options["double_quant"] else {}
        return AsHeld(options, {name: part.as_bytes for name, part in zip(names, self.parts)}, plain)

    def rows_as_held(self, storage: str, first: int, rows: int) -> AsHeld | None:
        """Whole blocks. Statistics are those that the quantised ones stand for: each weight has an offset of its own."""
        begin, end = first * self.shape[-1], (first + rows) * self.shape[-1]
        if storage != self.quant_type or begin % self.blocksize or (end % self.blocksize and end < self.numel):
            return None

        def codes(read: ReadBytes, start: int, stop: int) -> Tensor:
            return self.parts[0].as_bytes(read, begin // 2 + start, begin // 2 + stop)

        absmax = partial(self._absmax_bytes, begin // self.blocksize)
        return AsHeld({"double_quant": False, "blocksize": self.blocksize}, {"codes": codes, "absmax": absmax})

    def _absmax_bytes(self, first: int, read: ReadBytes, start: int, stop: int) -> Tensor:
        """Bytes of the float32 absmax of the blocks from `first` on."""
        low, high = first + start // 4, first + -(-stop // 4)
        nested, known = None, low
        if len(self.parts) > 2:
            known = low // NESTED_BLOCKSIZE * NESTED_BLOCKSIZE
            nested = self.parts[2].entries(read, known // NESTED_BLOCKSIZE, -(-high // NESTED_BLOCKSIZE))
        absmax = self.parts[1].entries(read, known, high)
        packed = Packed4bit(absmax, absmax, nested, self.offset, self.blocksize, self.quant_type, (1, 0))
        return plain_absmax(packed)[low - known :].view(torch.int8)[start % 4 :][: stop - start]


@reads("bitsandbytes")
def find(files: Files, settings: Mapping[str, Any]) -> Found:
    found = Found()
    for key in files:
        weight, mark, quant_type = key.partition(STATE)
        if mark:
            found.weights[weight] = _weight(files, weight, key, quant_type)
            found.dropped |= {k for k in (key, f"{weight}.quant_map", f"{weight}.nested_quant_map") if k in files}
    for key in files:
        weight = BESIDE.sub("", key)
        if weight != key and weight not in found.weights:
            raise files.refusal(f"lack {weight}{STATE}nf4 (or fp4), without which {key} means nothing")
    return found


def _weight(files: Files, weight: str, key: str, quant_type: str) -> FourBitWeight:
    state = _state(files, key)
    if quant_type not in ("nf4", "fp4") or state["quant_type"] != quant_type:
        raise files.refusal(f"hold {weight} as bitsandbytes {quant_type!r}; accepted: nf4, fp4")
    shape, blocksize = state["shape"], state["blocksize"]
    blocks = math.ceil(math.prod(shape) / blocksize)
    codes = files.stored(weight, weight)
    packed = math.ceil(math.prod(shape) / 2)
    files.check(codes, (codes.dtype,), -(-packed // codes.dtype.itemsize))
    _check_map(files, weight, f"{weight}.quant_map", four_bit_map(quant_type))
    absmax, nested = files.stored(f"{weight}.absmax", weight), []
    if "nested_offset" in state:
        files.check(absmax, (torch.uint8,), blocks)
        _check_map(files, weight, f"{weight}.nested_quant_map", nested_map())
        if state["nested_blocksize"] != NESTED_BLOCKSIZE:
            raise files.refusal(
                f"hold the statistics of {weight} in blocks of {state['nested_blocksize']}; accepted: {NESTED_BLOCKSIZE}, as "
                "bitsandbytes writes them"
            )
        numel = math.ceil(blocks / NESTED_BLOCKSIZE)
        nested = [files.check(files.stored(f"{weight}.nested_absmax", weight), (torch.float32,), numel)]
    else:
        files.check(absmax, (torch.float32,), blocks)
    return FourBitWeight(
        kind=f"bitsandbytes {quant_type}",
        parts=(codes, absmax, *nested),
        shape=shape,
        unit=blocksize * (NESTED_BLOCKSIZE if nested else 1),
        storage=quant_type,
        quant_type=quant_type,
        blocksize=blocksize,
        offset=float(state.get("nested_offset", 0.0)),
    )


def _state(files: Files, key: str) -> dict[str, Any]:
    """What the JSON says: quant_type, blocksize, shape, and of double quantisation nested_blocksize and nested_offset."""
    stored = files.stored(key, key.partition(STATE)[0])
    try:
        state = json.loads(bytes(stored.whole(files.read).view(torch.uint8).tolist()))
        state["shape"] = tuple(int(side) for side in state["shape"])
        state["blocksize"] = int(state["blocksize"])
        if len(state["shape"]) != 2 or state["blocksize"] < 2 or state["blocksize"] % 2:
            raise ValueError(f"shape {state['shape']}, blocksize {state['blocksize']}")
        return {"quant_type": "", **state}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise files.refusal(f"hold {key}, which does not say how they are quantised ({error!r})") from error


def _check_map(files: Files, weight: str, key: str, expected: Tensor) -> None:
    stored = files.check(files.stored(key, weight), (torch.float32,), expected.numel())
    if not torch.equal(stored.whole(files.read), expected):
        raise files.refusal(f"hold {key} with other values than bitsandbytes' own; accepted: its nf4 and fp4")
