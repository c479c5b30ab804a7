"""Ranges of a checkpoint's tensors: the file's own values, no byte twice, and one sentence where the file ends too early."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_subspace.errors import UsageError
from dist_subspace.loading import ranges
from dist_subspace.loading.index import CheckpointIndex, open_checkpoint
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.ranges import FLOATS, RangeReader

FLOAT32 = Layout.of("torch.float32", (37, 11))


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    (tmp_path / "config.json").write_text("{}")
    tensors = {str(dtype): (100 * torch.randn(37, 11)).to(dtype) for dtype in FLOATS.values()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "more": "x" * 13})
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
@pytest.mark.parametrize("chunk", [4, 64, 1 << 20])
def test_any_range_is_that_of_the_tensor(
    index: CheckpointIndex, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    key = str(dtype)
    whole = index.read(key)
    index.bytes_read.total = 0
    with RangeReader(index) as reader:
        layout = Layout.of(key, whole.shape)
        for seen_as, flat in ((layout, whole), (layout.transpose(0, 1), whole.t().contiguous())):
            for start, stop, unit in ((0, 407, 1), (3, 400, 7), (64, 128, 64), (5, 5, 1), (406, 407, 11)):
                seen = start
                for first, values in reader.entries(seen_as, start, stop, unit):
                    assert first == seen and values.dtype == dtype
                    assert values.numel() % unit == 0 or first + values.numel() == stop
                    assert values.numel() <= max(chunk, unit)
                    expected = flat.view(-1)[first : first + values.numel()]
                    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
                    seen += values.numel()
                assert seen == stop


def test_every_byte_that_is_read_is_counted(index: CheckpointIndex) -> None:
    assert index.bytes_read.total == 0 and index.size("torch.bfloat16") == 2 * 37 * 11
    with RangeReader(index) as reader:
        layout = Layout.of("torch.bfloat16", (37, 11))
        list(reader.entries(layout, 10, 60, 1))
        assert index.bytes_read.total == 2 * 50
        list(reader.entries(layout.transpose(0, 1), 37, 3 * 37, 1))  # two columns of the file
        assert index.bytes_read.total == 2 * 50 + 2 * 2 * 37
        index.read("torch.float32")
    assert index.bytes_read.total == 2 * 50 + 2 * 2 * 37 + 4 * 37 * 11


def test_a_file_that_has_become_shorter_is_one_sentence(index: CheckpointIndex) -> None:
    file = index.folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(index.spans["torch.float32"][0] + 100)
    with (
        RangeReader(index) as reader,
        pytest.raises(
            UsageError,
            match=r"model\.safetensors is cut short: it ends within torch\.float32; copy or download it again",
        ),
    ):
        list(reader.entries(FLOAT32, 0, 407, 1))
    file.unlink()
    with (
        RangeReader(index) as reader,
        pytest.raises(
            UsageError,
            match=r"model\.safetensors cannot be read \(No such file or directory\); copy or download it again",
        ),
    ):
        list(reader.entries(FLOAT32, 0, 407, 1))


def test_files_are_closed(index: CheckpointIndex) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with RangeReader(index) as reader:
        list(reader.entries(FLOAT32, 0, 407, 1))
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before
