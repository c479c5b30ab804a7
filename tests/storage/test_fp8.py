"""fp8 holds the bytes of transformers' fine-grained FP8, which are those of DeepSeek's and Qwen's files."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Linear, Fp8Quantize

from dist_subspace.storage import adopt, pack
from dist_subspace.storage.fp8 import STRIP_ON_CPU, quantize
from dist_subspace.storage.raw import float8_numbers

SETTINGS = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_transformers(dtype: torch.dtype) -> None:
    weight = (torch.randn(384, 256) * torch.logspace(-6, 4, 384)[:, None]).to(dtype)
    weight[:128, :128] = 0
    theirs = Fp8Quantize(SETTINGS).convert({"w.weight": weight})
    codes, scale = quantize(weight)
    assert torch.equal(codes.view(torch.int8), theirs["w.weight"].view(torch.int8))
    assert torch.equal(scale, theirs["w.weight_scale_inv"])
    both = {"w.weight": [codes], "w.weight_scale_inv": [scale]}
    dense = Fp8Dequantize(SETTINGS).convert(both, full_layer_name="w.weight")["w.weight"]
    dense = dense[0] if isinstance(dense, list) else dense
    held = pack(weight, "fp8").dense(torch.float32)
    assert torch.equal(held.to(dense.dtype), dense)


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (129, 128), (260, 131)])
def test_blocks_at_the_edge_have_scales_of_their_own(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    held = pack(weight, "fp8").dense(torch.float32)
    for rows in weight.split(128):
        assert rows.shape[1] == shape[1]
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = weight[row : row + 128, column : column + 128]
            error = (held[row : row + 128, column : column + 128] - block).abs()
            # e4m3 has 3 bits after the point: half a unit is 2^-4 of a number, and 2^-10 of the scale below its normal range
            limit = block.abs() / 16 + block.abs().max() / 448 * 2.0**-10 + 1e-7
            assert bool((error <= limit).all())


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_is_the_number_that_torch_makes_of_it(kind: torch.dtype) -> None:
    """NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(kind).repeat(3).view(3, 8, 32)[:, 1:]
    assert torch.equal(float8_numbers(codes).view(torch.int32), codes.float().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_that_is_decoded_strip_by_strip_is_codes_times_scales(dtype: torch.dtype) -> None:
    """Of several strips, with a last one that is shorter, and blocks that are cut off at both edges."""
    rows, columns = 2 * STRIP_ON_CPU // 1300 + 77, 1300
    packed = pack(torch.randn(rows, columns), "fp8")
    codes = packed.get_parameter("codes").view(torch.float8_e4m3fn).float()
    scale = packed.get_parameter("scale").view(torch.float32).view(-(-rows // 128), -(-columns // 128))
    whole = codes * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    assert len(list(packed.row_slices(128, STRIP_ON_CPU))) > 2
    assert torch.equal(packed.decode(dtype), whole.to(dtype))


def test_a_layer_of_transformers_is_taken_over_byte_for_byte() -> None:
    layer = FP8Linear(256, 384, block_size=(128, 128), has_bias=True)
    codes, scale = quantize(torch.randn(384, 256))
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    nn.init.normal_(layer.bias)
    operator = adopt(layer)
    assert operator is not None and operator.storage == "fp8"
    assert torch.equal(operator.codes, codes.view(torch.int8))  # type: ignore[attr-defined]
    x = torch.randn(3, 256)
    whole = (codes.float().view(3, 128, 2, 128) * scale[:, None, :, None]).view(384, 256)
    torch.testing.assert_close(operator(x), nn.functional.linear(x, whole, layer.bias))


@pytest.mark.parametrize("change", [{"block_size": (64, 64)}, {"block_size": None}, {"activation_scheme": "static"}])
def test_a_layer_in_another_layout_is_not_taken_for_it(change: dict[str, object]) -> None:
    layer = FP8Linear(256, 384, **({"block_size": (128, 128)} | change))  # type: ignore[arg-type]
    assert adopt(layer) is None


def test_scales_of_another_type_are_not_taken_for_float32() -> None:
    layer = FP8Linear(256, 384, block_size=(128, 128))
    codes, scale = quantize(torch.randn(384, 256))
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scale.to(torch.float8_e8m0fnu), requires_grad=False)  # DeepSeek-V3.1's
    assert adopt(layer) is None
