"""Which files of a folder are its weights: transformers' rule, for every reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dist_subspace as dsub
from dist_subspace.checkpoint.fingerprint import base_fingerprint
from dist_subspace.errors import UsageError
from dist_subspace.loading.index import PIECE, open_checkpoint, weight_files
from dist_subspace.notices import heard
from tests.tiny_models import logits, tiny_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def both(folder: Path) -> None:
    """The shards of one model, and the single file of another, in one folder."""
    tiny_model(seed=1).save_pretrained(folder, max_shard_size="20KB")
    tiny_model(seed=2).save_pretrained(folder / "other")
    (folder / "other" / SINGLE).rename(folder / SINGLE)


def rename(folder: Path, name: str) -> None:
    (folder / SINGLE).rename(folder / name)


def beside(folder: Path, *names: str) -> None:
    """Files that are no part of the model."""
    for name in names:
        save_file({"lm_head.weight": torch.full((96, 32), 7.0), "x": torch.ones(1)}, folder / name)


@pytest.mark.parametrize("situation", ["single and index", "files beside", "named single", "named index"])
def test_the_files_are_those_that_transformers_reads(situation: str, tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path)
    if situation == "single and index":
        both(tmp_path)
    elif situation == "files beside":
        names = ("adapter_model", "consolidated", "model.fp16", "model-00001-of-00002", "optimizer")
        beside(tmp_path, *(f"{name}.safetensors" for name in names))
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        tiny_model(seed=3).save_pretrained(tmp_path / "other", max_shard_size="20KB" if "index" in situation else "5GB")
        for file in (tmp_path / "other").glob("model*"):
            file.rename(tmp_path / ("chosen" + file.name.removeprefix("model")))
        name = "chosen.safetensors.index.json" if "index" in situation else "chosen.safetensors"
        if "index" in situation:
            text = (tmp_path / name).read_text().replace('"model-', '"chosen-')
            (tmp_path / name).write_text(text)
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = dsub.load_frozen(tmp_path, storage="fp32")
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


def test_a_second_set_of_weights_is_said(tmp_path: Path) -> None:
    both(tmp_path)
    (said,) = open_checkpoint(tmp_path).notes
    assert "holds both" in said and "of the same tensors; model.safetensors is read, as transformers does" in said
    listed = json.loads((tmp_path / INDEX).read_text())
    del listed["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX).write_text(json.dumps(listed))
    told: list[str] = []
    with heard(told.append):
        dsub.load_frozen(tmp_path, storage="bf16")
    assert len(told) == 1 and "whose tensors are others: it is stale" in told[0]
    with pytest.warns(UserWarning, match="it is stale"):
        dsub.load_frozen(tmp_path, storage="bf16")


def test_an_index_of_the_single_file_is_not_worth_a_word(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    keys = load_file(tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, SINGLE)}))
    assert open_checkpoint(tmp_path).notes == ()


def test_the_fingerprint_is_of_the_files_that_are_read(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path)
    plain = base_fingerprint(tmp_path)
    beside(tmp_path, "consolidated.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "consolidated.safetensors"}}))
    assert base_fingerprint(tmp_path) == plain and weight_files(tmp_path) == [tmp_path / SINGLE]
    beside(tmp_path, SINGLE)
    assert base_fingerprint(tmp_path) != plain


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.fp16.safetensors", r"holds model\.fp16\.safetensors, but neither model\.safetensors nor .*rename"),
        ("adapter_model.safetensors", r"holds adapter_model\.safetensors, but neither"),
        (
            "model-00001-of-00001.safetensors",
            r"holds model-00001-of-00001\.safetensors, but neither .*copy the index too",
        ),
    ],
)
def test_weights_of_another_name_are_refused_as_transformers_does(name: str, sentence: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    rename(tmp_path, name)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for read in (open_checkpoint, base_fingerprint, dsub.load_frozen):
        with pytest.raises(UsageError, match=sentence):
            read(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "absent.safetensors", "pytorch_model.bin"])
def test_a_named_file_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    with pytest.raises(UsageError, match=r"says transformers_weights: .*; accepted: a \.safetensors file or"):
        open_checkpoint(tmp_path)


def test_two_tensors_are_the_same_only_if_every_row_is(tmp_path: Path) -> None:
    """They are read in pieces of so many elements: here of a row each, and the last element of each row counts."""
    rows = torch.zeros(3, PIECE, dtype=torch.float8_e4m3fn)
    others = {f"other at {row}": rows.clone() for row in range(len(rows))}
    for row, other in enumerate(others.values()):
        other[row, -1] = 1
    save_file({"one": rows, "copy": rows.clone()} | others, tmp_path / SINGLE)
    index = open_checkpoint(tmp_path)
    assert index.same("one", "copy", torch.float32)
    assert not [name for name in others if index.same("one", name, torch.float32)]
