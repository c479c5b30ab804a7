"""The only file that touches bitsandbytes: its quantisers, and how its layers hold their bytes.

Read against bitsandbytes 0.50.2. Public functions of `bitsandbytes.functional` are used where there are any; what is
reached below them (a quantised layer's `quant_state`, `CB`, `SCB`, `packing_format_for_cpu`) is named in the function that
does it, and tests/storage/test_bnb.py fails when those move.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

# On import, bitsandbytes' CPU back end says which optional kernel it does not find; the kernel is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dist_subspace.late_compile import compiled_when_called  # noqa: E402

with compiled_when_called():
    from bitsandbytes import functional as bnb_functional
    from bitsandbytes import nn as bnb_nn

from dist_subspace.errors import UsageError  # noqa: E402
from dist_subspace.storage.four_bit_cpu import quantize_blocks  # noqa: E402

NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class Packed4bit:
    """A matrix in 4 bits: `codes` uint8 `(numel / 2,)`; `absmax` float32 a block, or uint8 with `nested` float32 and offset."""

    codes: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: float
    blocksize: int
    quant_type: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Packed8bit:
    """A matrix in 8 bits: `codes` int8 `(d_out, d_in)`, `scale` float32 `(d_out,)`, the largest magnitude of each row."""

    codes: Tensor
    scale: Tensor


def quantize_4bit(weight: Tensor, quant_type: str, *, double_quant: bool, blocksize: int = 64) -> Packed4bit:
    """bitsandbytes' own 4-bit quantiser, byte for byte; `weight` is `(d_out, d_in)` in any of its float types."""
    codes, absmax = quantize_4bit_blocks(weight.reshape(-1), quant_type, blocksize=blocksize)
    nested, offset = None, 0.0
    if double_quant:
        offset = absmax_offset(absmax)
        absmax, nested = quantize_absmax(absmax, offset)
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    return Packed4bit(codes, absmax, nested, offset, blocksize, quant_type, shape)


def quantize_4bit_blocks(flat: Tensor, quant_type: str, *, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Of flat entries that begin at a block's first: codes uint8 `(ceil(numel / 2),)` and absmax float32, one a block. Blocks are
    quantised one by one, so that these are the bytes that the quantised whole has there."""
    if flat.device.type == "cpu" and _same_on_cpu(quant_type, blocksize):
        return quantize_blocks(flat, _code_values(quant_type), blocksize)
    codes, state = bnb_functional.quantize_4bit(flat.contiguous(), blocksize=blocksize, quant_type=quant_type)
    return codes.contiguous().view(torch.uint8).reshape(-1), state.absmax.float()


def absmax_offset(absmax: Tensor) -> float:
    """What a double quantisation subtracts from all absmax of a matrix: their mean, as bitsandbytes sums it."""
    return float(absmax.mean())


def quantize_absmax(absmax: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """The second quantisation of `quantize_4bit`: uint8 one a block, and float32 one for `NESTED_BLOCKSIZE` blocks."""
    codes, state = bnb_functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return codes, state.absmax.float()


def plain_absmax(packed: Packed4bit) -> Tensor:
    """float32, one a block."""
    if packed.nested is None:
        return packed.absmax
    state2 = bnb_functional.QuantState(
        absmax=packed.nested, code=_dynamic_map(packed.absmax.device), blocksize=NESTED_BLOCKSIZE, dtype=torch.float32
    )
    return bnb_functional.dequantize_blockwise(packed.absmax, state2) + packed.offset


def dequantize_4bit(packed: Packed4bit, dtype: torch.dtype) -> Tensor:
    """The matrix `(d_out, d_in)`. The bytes are one run of blocks that crosses rows, and are decoded as one."""
    absmax = plain_absmax(packed)
    rows, columns = packed.shape
    numel = rows * columns
    # The CPU back end shares rows out among threads, and decodes those wrongly that end within a block: a block is a row to it.
    # Asked for an odd number of entries, it has a decoder compiled for it, seconds each.
    whole = numel % packed.blocksize == 0
    state = bnb_functional.QuantState(
        absmax=absmax,
        shape=(numel // packed.blocksize, packed.blocksize) if whole else (1, numel + numel % 2),
        dtype=dtype,
        blocksize=packed.blocksize,
        quant_type=packed.quant_type,
    )
    return bnb_functional.dequantize_4bit(packed.codes.view(-1, 1), state).view(-1)[:numel].view(rows, columns)


def quantize_8bit(weight: Tensor) -> Packed8bit:
    """bitsandbytes' row-wise int8 quantiser; it works on float16, as `Int8Params` does when a layer is moved. Rows that float16
    cannot hold (a bfloat16 weight above 65,504) are quantised divided by a power of two, and their scale is multiplied."""
    half = weight.to(torch.float16)
    exponents = torch.zeros(weight.shape[0], 1, device=weight.device)
    if not bool(half.isfinite().all()):
        largest = weight.abs().amax(dim=1, keepdim=True).float()
        exponents = (torch.frexp(largest)[1] - 15).clamp(min=0).float()
        half = (weight.float() * torch.exp2(-exponents)).to(torch.float16)
    codes, scale, _ = bnb_functional.int8_vectorwise_quant(half.contiguous())
    return Packed8bit(codes, scale.float() * torch.exp2(exponents.view_as(scale)))


def dequantize_8bit(codes: Tensor, scale: Tensor) -> Tensor:
    """Rows of a matrix in float32, as bitsandbytes rounds them."""
    values: Tensor = bnb_functional.int8_vectorwise_dequant(codes, scale)
    return values


def four_bit_map(quant_type: str) -> Tensor:
    """What each of the 16 codes stands for, float32."""
    return torch.tensor(_code_values(quant_type))


def nested_map() -> Tensor:
    """What each byte of a quantised absmax stands for, float32 `(256,)`."""
    return _dynamic_map(torch.device("cpu"))


def is_4bit(module: nn.Module) -> bool:
    return isinstance(module, bnb_nn.Linear4bit)


def is_8bit(module: nn.Module) -> bool:
    return isinstance(module, bnb_nn.Linear8bitLt)


def read_4bit(module: Any) -> Packed4bit:
    """What a `Linear4bit` holds (private: `weight.quant_state`, `packing_format_for_cpu`).

    On CPUs with AVX512-BF16 an evaluation repacks the bytes for inference, and rounds absmax to bfloat16: not undone here.
    """
    state = getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise UsageError("a bitsandbytes 4-bit layer has not been quantised yet: move the model to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise UsageError(
            "the model's 4-bit layers were repacked by an evaluation on this CPU, which rounds their statistics: "
            "load the model again and attach before the first evaluation"
        )
    return _from_state(module.weight.data, state)


def read_8bit(module: Any) -> Packed8bit:
    """What a `Linear8bitLt` holds, before its first forward (`weight.CB`) or after it (`state.CB`)."""
    codes = module.weight.CB if module.weight.CB is not None else module.state.CB
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if codes is None:
        codes = module.weight.data
    if scale is None or codes.dtype != torch.int8:
        raise UsageError("a bitsandbytes 8-bit layer has not been quantised yet: move the model to its device first")
    return Packed8bit(codes, scale.float())


def _from_state(codes: Tensor, state: bnb_functional.QuantState) -> Packed4bit:
    if state.nested and not torch.equal(state.state2.code.cpu(), _dynamic_map(torch.device("cpu"))):
        raise UsageError("a 4-bit layer's nested statistics use another code than bitsandbytes' dynamic map")
    if state.nested and state.state2.blocksize != NESTED_BLOCKSIZE:
        raise UsageError(f"a 4-bit layer's nested blocksize is {state.state2.blocksize}; accepted: {NESTED_BLOCKSIZE}")
    return Packed4bit(
        codes=codes.contiguous().view(torch.uint8).reshape(-1),
        absmax=state.absmax if state.nested else state.absmax.float(),
        nested=state.state2.absmax.float() if state.nested else None,
        offset=float(state.offset) if state.nested else 0.0,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        shape=(int(state.shape[0]), int(state.shape[1])),
    )


@functools.lru_cache(maxsize=4)
def _code_values(quant_type: str) -> tuple[float, ...]:
    return tuple(bnb_functional.get_4bit_type(quant_type, device="cpu").tolist())


@functools.lru_cache(maxsize=16)
def _same_on_cpu(quant_type: str, blocksize: int) -> bool:
    """Whether our quantiser gives the bytes of the installed bitsandbytes, seen on a few thousand entries with an odd end."""
    sample = torch.linspace(-3, 3, 4099).view(-1)
    sample[: 2 * blocksize] = sample[: 2 * blocksize].sin()
    codes, state = bnb_functional.quantize_4bit(sample, blocksize=blocksize, quant_type=quant_type)
    try:
        ours = quantize_blocks(sample, _code_values(quant_type), blocksize)
    except ValueError:  # values that it has no table for
        return False
    return torch.equal(ours[0], codes.reshape(-1)) and torch.equal(ours[1], state.absmax)


@functools.lru_cache(maxsize=8)
def _dynamic_map(device: torch.device) -> Tensor:
    values: Tensor = bnb_functional.create_dynamic_map()
    return values.to(device)
