"""Packed bytes are bitsandbytes' own; and its private names that are used here are still there."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as reference
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.storage import FrozenLinear, bnb, pack
from dist_subspace.storage.raw import from_bytes

SHAPES = [(172, 64), (7, 5), (33, 31), (9, 1), (300, 128)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each_shape
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_4bit_bytes_and_statistics_are_those_of_bitsandbytes(
    shape: tuple[int, int], quant_type: str, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, dtype=dtype)
    for double_quant in (False, True):
        codes, state = reference.quantize_4bit(
            weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
        )
        held = pack(weight, quant_type, double_quant=double_quant).packed()  # type: ignore[operator]
        assert torch.equal(held.codes.view(-1), codes.view(-1))
        assert torch.equal(held.absmax, state.absmax)
        assert held.absmax.dtype == (torch.uint8 if double_quant else torch.float32)
        if double_quant:
            assert torch.equal(held.nested, state.state2.absmax) and held.offset == state.offset.item()


@each_shape
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_bytes_decode_to_what_bitsandbytes_decodes(shape: tuple[int, int], quant_type: str) -> None:
    weight = torch.randn(shape)
    for double_quant in (False, True):
        codes, state = reference.quantize_4bit(
            weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
        )
        held = pack(weight, quant_type, double_quant=double_quant)
        torch.testing.assert_close(held.dense(), _decoded_by_table(codes, state, shape), rtol=0, atol=1e-6)


def _decoded_by_table(codes: torch.Tensor, state: reference.QuantState, shape: tuple[int, int]) -> torch.Tensor:
    """Dequantisation by its definition: table entry times the block's absmax; the first of two values is the high half."""
    absmax = state.absmax
    if state.nested:
        absmax = state.state2.code[absmax.long()] * state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = absmax + state.offset
    numel = shape[0] * shape[1]
    flat = codes.view(-1).long()
    values = state.code[torch.stack([flat >> 4, flat & 15], 1).view(-1)[:numel]]
    return (values * absmax.repeat_interleave(64)[:numel]).view(shape)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_bytes_and_scales_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    layer = bitsandbytes.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    if layer.weight.CB is None:  # some versions quantise on the CPU only when asked
        layer.weight._quantize("cpu")
    held = pack(weight, "int8")
    assert torch.equal(held.codes.view(torch.int8), layer.weight.CB)
    assert torch.equal(from_bytes(held.get_parameter("scale"), torch.float32), layer.weight.SCB.float())


def test_nested_statistics_really_are_smaller() -> None:
    def size(double_quant: bool) -> int:
        held: FrozenLinear = pack(torch.randn(512, 512), "nf4", double_quant=double_quant)
        return sum(p.numel() * p.element_size() for p in held.parameters())

    assert size(False) == 512 * 512 // 2 + 4 * 4096
    assert size(True) == 512 * 512 // 2 + 4096 + 4 * 16


def test_the_private_names_of_a_4bit_layer_are_where_they_were() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = layer.weight.quant_state
    for name in ("absmax", "shape", "code", "blocksize", "quant_type", "nested", "offset", "state2"):
        assert hasattr(state, name), f"bitsandbytes' QuantState has no {name} now; see dist_subspace/storage/bnb.py"
    assert state.nested and state.state2.blocksize == bnb.NESTED_BLOCKSIZE
    assert tuple(state.shape) == (32, 64)
    assert layer.weight.data.dtype == torch.uint8


def test_the_private_names_of_an_8bit_layer_are_where_they_were() -> None:
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).to("cpu")
    assert hasattr(layer.weight, "CB") and hasattr(layer.weight, "SCB"), "Int8Params lost CB or SCB; see storage/bnb.py"
    assert hasattr(layer.state, "CB") and hasattr(layer.state, "SCB"), (
        "MatmulLtState lost CB or SCB; see storage/bnb.py"
    )


def test_the_nested_code_is_the_dynamic_map() -> None:
    _, state = reference.quantize_4bit(torch.randn(64, 64), compress_statistics=True)
    assert torch.equal(state.state2.code, reference.create_dynamic_map()), "another nested code; see storage/bnb.py"


def test_a_layer_repacked_by_an_evaluation_is_refused_with_the_reason() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False).to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True  # what bitsandbytes sets on a CPU with AVX512-BF16
    with pytest.raises(UsageError, match=r"repacked by an evaluation on this CPU.*attach before the first evaluation"):
        bnb.read_4bit(layer)


def test_an_evaluation_on_this_machine_is_either_harmless_or_refused() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16).to("cpu").eval()
    before = bnb.read_4bit(layer)
    codes = before.codes.clone()
    with torch.no_grad():
        layer(torch.randn(2, 64, dtype=torch.bfloat16))
    try:
        after = bnb.read_4bit(layer)
    except UsageError as error:
        assert "repacked" in str(error)
    else:
        assert torch.equal(after.codes, codes)


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_a_layer_that_was_not_quantised_yet_is_refused(kind: str) -> None:
    if kind == "4-bit":
        layer: nn.Module = bitsandbytes.nn.Linear4bit(64, 32, bias=False)
        with pytest.raises(UsageError, match="4-bit layer has not been quantised yet"):
            bnb.read_4bit(layer)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
        with pytest.raises(UsageError, match="8-bit layer has not been quantised yet"):
            bnb.read_8bit(layer)
