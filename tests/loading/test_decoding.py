"""Any run of a weight's entries is that of the whole, in every format and in both orders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as reference
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_subspace.loading import decoding, ranges
from dist_subspace.loading.decoded import decoded_index
from dist_subspace.loading.index import CheckpointIndex, open_checkpoint
from dist_subspace.loading.ranges import RangeReader
from tests.quantised_folders import factors, fp8_blocks

SHAPE = (37, 45)
MATRIX = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def nf4(double: bool) -> tuple[dict[str, Tensor], Tensor]:
    codes, state = reference.quantize_4bit(MATRIX, blocksize=64, quant_type="nf4", compress_statistics=double)
    beside = {f"w.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    # As one run: rows of another width than a block's are decoded wrongly on CPUs, and odd ones by a decoder that is compiled.
    state.shape = torch.Size((1, MATRIX.numel() + 1))
    whole = reference.dequantize_4bit(codes, state).view(-1)[: MATRIX.numel()].view(SHAPE)
    return {"w.weight": codes, **beside}, whole


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
CHUNKS = (7, 64, 1 << 20)


@pytest.fixture(params=FORMATS)
def weight(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CheckpointIndex, Tensor]:
    method, make, settings = FORMATS[request.param]
    tensors, whole = make()
    (tmp_path / "config.json").write_text(json.dumps({}))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plain = nn.Linear(1, 1)  # that has no Conv1D is all that is asked of the model
    settings = {"quant_method": method, **settings}
    return decoded_index(open_checkpoint(tmp_path), settings, plain, torch.float32), whole  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_run_is_that_of_the_whole(
    weight: tuple[CheckpointIndex, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    monkeypatch.setattr(ranges, "CHUNK", 3 * chunk)
    index, whole = weight
    layout = index.layout("w.weight")
    assert index.shapes["w.weight"] == layout.shape == tuple(whole.shape)
    for one, flat in (
        (layout, whole),
        (layout.transpose(-2, -1), whole.mT),
        (layout.narrow(-1, 1, 4), whole[..., 1:5]),
    ):
        flat, end = flat.reshape(-1), flat.numel()
        with RangeReader(index) as reader:
            for start, stop, unit in ((0, end, 1), (3, end - 5, 7), (64, 128, 64), (5, 5, 1), (end - 1, end, 11)):
                seen = start
                for first, values in reader.entries(one, start, stop, unit):
                    assert first == seen and values.dtype == torch.float32
                    assert torch.equal(values, flat[first : first + values.numel()])
                    seen += values.numel()
                assert seen == stop


def test_a_matrix_in_another_order_is_read_once(
    weight: tuple[CheckpointIndex, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece, whichever order is asked for."""
    monkeypatch.setattr(ranges, "CHUNK", 64)
    index, whole = weight
    for layout in (index.layout("w.weight"), index.layout("w.weight").transpose(-2, -1)):
        index.bytes_read.total = 0
        with RangeReader(index) as reader:
            assert sum(values.numel() for _, values in reader.entries(layout, 0, whole.numel(), 1)) == whole.numel()
        if layout.is_turned:
            assert index.bytes_read.total == index.size("w.weight")
    assert torch.equal(index.read("w.weight"), whole)
