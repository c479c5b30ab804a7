"""The fingerprint is of what the weights are, not of where they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_subspace.checkpoint import fingerprint
from dist_subspace.checkpoint.fingerprint import base_fingerprint, file_fingerprint
from dist_subspace.errors import UsageError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "5.17", "dtype": "x"}))
    save_file({"w": torch.arange(4096.0), "b": torch.zeros(3)}, folder / "model.safetensors")
    return folder


def test_a_copy_elsewhere_is_the_same_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other" / "name")
    (tmp_path / "other" / "name" / "README.md").write_text("a note")
    assert base_fingerprint(tmp_path / "other" / "name") == base_fingerprint(model)


def test_a_tool_that_rewrites_the_configuration_does_not_change_the_model(model: Path) -> None:
    before = base_fingerprint(model)
    config = {"dtype": "bfloat16", "_name_or_path": "x", "hidden_size": 8, "transformers_version": "6.0"}
    (model / "config.json").write_text(json.dumps(config))
    assert base_fingerprint(model) == before


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": torch.arange(4096.0) + (torch.arange(4096) == 1777), "b": torch.zeros(3)},
        {"v": torch.arange(4096.0), "b": torch.zeros(3)},
        {"w": torch.arange(4096.0).view(64, 64), "b": torch.zeros(3)},
        {"w": torch.arange(4096.0).view(torch.int32), "b": torch.zeros(3)},
    ],
    ids=["one value", "name", "shape", "type"],
)
def test_any_change_of_the_weights_is_another_model(model: Path, tensors: dict[str, torch.Tensor]) -> None:
    before = base_fingerprint(model)
    save_file(tensors, model / "model.safetensors")
    assert base_fingerprint(model) != before


def test_the_same_tensors_with_a_header_in_other_words_are_the_same_model(model: Path) -> None:
    file = model / "model.safetensors"
    save_file({"w": torch.arange(4096.0), "b": torch.zeros(3)}, file, metadata={"format": "pt", "by": "another tool"})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    reordered = json.dumps({name: header[name] for name in sorted(header, reverse=True)}, separators=(",", ":"))
    same = base_fingerprint(model)
    other_metadata = header | {"__metadata__": {"format": "tf", "by": "another tool"}}
    for text in (reordered, json.dumps(other_metadata, separators=(",", ":"))):
        file.write_bytes(content[:8] + text.encode().ljust(length) + content[8 + length :])
        assert file.read_bytes() != content and base_fingerprint(model) == same


def test_another_architecture_is_another_model(model: Path) -> None:
    before = base_fingerprint(model)
    (model / "config.json").write_text(json.dumps({"hidden_size": 8, "rope_theta": 5e5}))
    assert base_fingerprint(model) != before


def test_the_files_of_an_index_count_and_no_others(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    save_file({"c": torch.ones(2)}, model / "model-2.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    both = base_fingerprint(model)
    save_file({"x": torch.ones(2)}, model / "adapter_model.safetensors")
    assert base_fingerprint(model) == both
    save_file({"c": torch.zeros(2)}, model / "model-2.safetensors")
    assert base_fingerprint(model) != both
    (model / "model-2.safetensors").unlink()
    with pytest.raises(UsageError, match=r"names model-2\.safetensors, which is not in the folder"):
        base_fingerprint(model)


def test_a_large_file_is_sampled_at_both_ends_and_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_DATA", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 16)
    path, content = tmp_path / "data.jsonl", bytearray(range(256)) * 40
    path.write_bytes(content)
    whole = file_fingerprint(path)
    for place in (0, 15, len(content) - 1, len(content) - 16):
        path.write_bytes(content[:place] + b"\xff\x00"[content[place] == 255 :][:1] + content[place + 1 :])
        assert file_fingerprint(path) != whole, place
    for place in range(0, len(content) - 400, 400):  # 32 samples, a 31st of the file apart
        path.write_bytes(
            content[:place] + bytes(255 - byte for byte in content[place : place + 400]) + content[place + 400 :]
        )
        assert file_fingerprint(path) != whole, place
    path.write_bytes(content + b"\n")
    assert file_fingerprint(path) != whole
    path.write_bytes(content)
    assert file_fingerprint(path) == whole


def test_what_is_no_model_is_refused_with_the_file_named(model: Path, tmp_path: Path) -> None:
    weights = (model / "model.safetensors").read_bytes()
    for cut in (weights[:-1], weights[:20], weights[:3], b"\xff" * 64):
        (model / "model.safetensors").write_bytes(cut)
        with pytest.raises(UsageError, match=r"model\.safetensors"):
            base_fingerprint(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        base_fingerprint(model)
    with pytest.raises(UsageError, match=r"no config\.json"):
        base_fingerprint(tmp_path)
    with pytest.raises(UsageError, match="is no file"):
        file_fingerprint(tmp_path / "absent.jsonl")


def test_a_real_model_has_a_fingerprint(stories260k: Path) -> None:
    assert len(base_fingerprint(stories260k)) == 64
