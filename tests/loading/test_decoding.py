"""Any run of a weight's entries is that of the whole, in every format and in both orders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as reference
from safetensors.torch import save_file
from torch import Tensor

from dist_subspace.loading import decoding
from dist_subspace.loading.decoding import decoded
from dist_subspace.loading.formats import find_weights
from dist_subspace.loading.index import open_checkpoint
from dist_subspace.loading.ranges import RangeReader
from tests.quantised_folders import factors, fp8_blocks

SHAPE = (37, 45)
MATRIX = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def nf4(double: bool) -> tuple[dict[str, Tensor], Tensor]:
    codes, state = reference.quantize_4bit(MATRIX, blocksize=64, quant_type="nf4", compress_statistics=double)
    beside = {f"w.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"w.weight": codes, **beside}, reference.dequantize_4bit(codes, state)


def int8() -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, _ = reference.int8_vectorwise_quant(MATRIX.half())
    return {"w.weight": codes, "w.SCB": scale}, reference.int8_vectorwise_dequant(codes, scale)


def fp8(block: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    codes, grid = fp8_blocks(MATRIX, block)
    return {"w.weight": codes, "w.weight_scale_inv": grid}, codes.float() * factors(grid, block, SHAPE)


def mxfp4() -> tuple[dict[str, Tensor], Tensor]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 5, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 5, 2), generator=generator, dtype=torch.uint8)
    whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"w.weight_blocks": blocks, "w.weight_scales": scales}, whole


FORMATS = {
    "nf4": ("bitsandbytes", lambda: nf4(False), {}),
    "nf4-double": ("bitsandbytes", lambda: nf4(True), {}),
    "int8": ("bitsandbytes", int8, {}),
    "fp8": ("fp8", lambda: fp8((16, 8)), {"weight_block_size": [16, 8]}),
    "mxfp4": ("mxfp4", mxfp4, {}),
}
# Small enough that two blocks of four of absmax lie in a weight.
CHUNKS = (7, 64, 1 << 20)


@pytest.fixture(params=FORMATS)
def weight(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[object, RangeReader, Tensor]]:
    method, make, settings = FORMATS[request.param]
    tensors, whole = make()
    (tmp_path / "config.json").write_text(json.dumps({}))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = open_checkpoint(tmp_path)
    with RangeReader(index) as reader:
        found = find_weights(index, {"quant_method": method, **settings}, reader.bytes)
        yield found.weights["w.weight"], reader, whole


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_run_is_that_of_the_whole(
    weight: tuple[object, RangeReader, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(decoding, "CHUNK", chunk)
    held, reader, whole = weight
    for turned, flat in ((False, whole), (True, whole.mT.contiguous())):
        one = replace(held, turned=held.turned != turned)  # type: ignore[type-var, attr-defined]
        assert one.model_shape == tuple(flat.shape)
        for dtype in (torch.float32, torch.bfloat16):
            end = flat.numel()
            for start, stop, unit in ((0, end, 1), (3, end - 5, 7), (64, 128, 64), (5, 5, 1), (end - 1, end, 11)):
                seen = start
                for first, values in decoded(one, reader.bytes, (start, stop), unit, dtype):
                    assert first == seen and values.dtype == dtype
                    assert torch.equal(values, flat.view(-1)[first : first + values.numel()].to(dtype))
                    seen += values.numel()
                assert seen == stop
