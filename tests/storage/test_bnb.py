"""Packed bytes are bitsandbytes' own; and its private names that are used here are still there."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as reference
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.storage import FrozenLinear, adopt, bnb, pack
from dist_subspace.storage.raw import from_bytes
from tests.forked import run_lines
from tests.storage.by_table import decoded_by_table

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
        torch.testing.assert_close(held.dense(), decoded_by_table(codes, state, shape), rtol=0, atol=1e-6)


def test_a_matrix_of_an_odd_number_of_values_is_decoded_without_compiling_anything() -> None:
    """Seconds of every process, and a C++ compiler, for each size of a matrix."""
    ended = run_lines(
        "import torch\nfrom torch._dynamo.utils import counters\nfrom dist_subspace.storage import pack\n"
        "for kind in ('nf4', 'fp4'):\n    pack(torch.randn(7, 5), kind).dense()\n"
        "print('COMPILED', sum(counters['frames'].values()))"
    )
    assert "COMPILED 0" in ended.stdout, ended


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


@each_shape
def test_int8_bytes_decode_to_what_bitsandbytes_decodes(shape: tuple[int, int]) -> None:
    """And the product, which multiplies codes first and scales its rows then, is that of what bitsandbytes decodes."""
    weight = torch.randn(shape, dtype=torch.float16)
    codes, scale, _ = reference.int8_vectorwise_quant(weight)
    decoded = reference.int8_vectorwise_dequant(codes, scale)
    held = pack(weight, "int8")
    torch.testing.assert_close(held.dense(), decoded, rtol=1e-5, atol=1e-7)
    x = torch.randn(4, shape[1], requires_grad=True)
    y, g = held(x), torch.randn(4, shape[0])
    torch.testing.assert_close(y, x.detach() @ decoded.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g @ decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_rows_of_any_size_are_within_half_a_step(dtype: torch.dtype) -> None:
    """A step is the row's largest magnitude over 127; rows that float16 cannot hold are scaled by a power of two meanwhile."""
    sizes = torch.tensor([1e-3, 1.0, 6e4] + [1e6, 1e30] * (dtype == torch.bfloat16))
    weight = (torch.randn(len(sizes), 64).clamp(-1, 1) * sizes[:, None]).to(dtype)
    largest = weight.float().abs().amax(1, keepdim=True)
    error = (pack(weight, "int8").dense() - weight.float()).abs()
    assert (error <= (0.5 / 127 + 2**-11) * largest).all()


def test_int8_sums_of_a_wide_layer_do_not_overflow_float16() -> None:
    """127 for each of a thousand inputs is above what float16 holds: there the matrix is scaled, and not the product."""
    held, x = pack(torch.ones(2, 1024), "int8"), torch.ones(1, 1024, dtype=torch.float16, requires_grad=True)
    matrix, factors = held.entries(torch.float16)
    sums = (x.double() @ matrix.double().t()).half()
    assert torch.isfinite(sums).all() and (factors is None or torch.isfinite(factors).all())
    torch.testing.assert_close(held(x), torch.full((1, 2), 1024.0, dtype=torch.float16))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_a_4bit_layer_packed_again_keeps_its_blocks_and_has_its_own_statistics(quant_type: str, blocksize: int) -> None:
    """As a folded residual does: bytes, absmax, nested absmax and the mean that was taken out of it are the new matrix's."""
    for nested in (False, True):
        old, new = torch.randn(33, 31), 5 * torch.randn(33, 31) + 1
        settings = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
        layer = bitsandbytes.nn.Linear4bit(31, 33, bias=False, quant_type=quant_type, compress_statistics=nested)
        layer.weight = bitsandbytes.nn.Params4bit(old, requires_grad=False, **settings)
        held = adopt(layer.to("cpu")).repacked(new)
        codes, state = reference.quantize_4bit(new, **settings)
        packed = held.packed()  # type: ignore[attr-defined]
        assert torch.equal(packed.codes, codes.view(-1)) and torch.equal(packed.absmax, state.absmax)
        assert packed.blocksize == blocksize == state.blocksize
        assert packed.offset == (state.offset.item() if nested else 0.0)
        assert (packed.nested is not None) == nested and (not nested or torch.equal(packed.nested, state.state2.absmax))
        if blocksize == 64:
            torch.testing.assert_close(held.dense(), decoded_by_table(codes, state, (33, 31)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_sixteen_bits_are_the_decoded_matrix_rounded_once(quant_type: str) -> None:
    held = pack(torch.randn(33, 31), quant_type, double_quant=True)
    for dtype in (torch.bfloat16, torch.float16):
        assert held.dense(dtype).dtype == dtype
        torch.testing.assert_close(held.dense(dtype), held.dense().to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert held.dense(torch.float64).dtype == torch.float64
    assert torch.equal(held.dense(torch.float64).float(), held.dense())


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


def test_nested_statistics_of_another_kind_are_refused() -> None:
    """They would be decoded by a code, or in blocks, that they were not made with."""

    def layer() -> nn.Module:
        made = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compress_statistics=True)
        return made.to("cpu")

    other = layer()
    other.weight.quant_state.state2.code = torch.linspace(-1, 1, 256)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="another code than bitsandbytes' dynamic map"):
        bnb.read_4bit(other)
    other = layer()
    other.weight.quant_state.state2.blocksize = 128  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="nested blocksize is 128; accepted: 256"):
        bnb.read_4bit(other)


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
