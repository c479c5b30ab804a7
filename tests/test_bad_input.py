"""Bad input: exit status 2, one sentence that names the field, the value and what is accepted; no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dist_subspace.run_folder.status import read_status
from dist_subspace.training.run import train
from tests.tiny_run import make_model, make_records

Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole model and whole data."""
    folder = tmp_path_factory.mktemp("good")
    make_model(folder / "model")
    make_records(folder / "train.jsonl", 24)
    return folder


def configuration(folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "storage": "nf4"},
        "subspace": {"method": "lora", "rank": 2},
        "data": {"train": str(folder / "train.jsonl"), "format": "alpaca", "max_length": 64},
        "training": {"max_steps": 1, "global_batch_size": 4, "per_device_train_batch_size": 2},
        "run": {"output_dir": str(folder / "run"), "report_to": "none"},
    }


def put(section: str, key: str, value: Any) -> Change:
    return lambda config, folder: config.setdefault(section, {}).__setitem__(key, value)


def truncate(config: dict[str, Any], folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(config: dict[str, Any], folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def no_weights(config: dict[str, Any], folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def missing_tensor(config: dict[str, Any], folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file)


def tensor_not_in_file(config: dict[str, Any], folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    shard = file.rename(
        file.with_name("model-00001-of-00001.safetensors")
    )  # a single file would be read without its index
    names = dict.fromkeys([*load_file(shard), "lost.weight"], shard.name)
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def other_shape(config: dict[str, Any], folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(7)}, file)


def no_tokenizer(config: dict[str, Any], folder: Path) -> None:
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()


def records(text: str) -> Change:
    return lambda config, folder: (folder / "train.jsonl").write_text(text) and None


def file_in_the_way(config: dict[str, Any], folder: Path) -> None:
    (folder / "run").write_text("a file, not a folder")


CASES: dict[str, tuple[Change, list[str]]] = {
    "unknown key": (put("training", "learning_rat", 1), ["training.learning_rat", "learning_rate"]),
    "unknown section": (lambda c, f: c.__setitem__("trainning", {}), ["trainning", "training"]),
    "wrong type": (put("training", "seed", "one"), ["training.seed", "one"]),
    "max_steps 0": (put("training", "max_steps", 0), ["training.max_steps", "0"]),
    "negative learning rate": (put("training", "learning_rate", -1.0), ["training.learning_rate", "-1"]),
    "dropout out of range": (put("subspace", "dropout", 1.5), ["subspace.dropout", "1.5"]),
    "unknown method": (put("subspace", "method", "lorra"), ["subspace.method", "lorra", "lora", "ssl", "ssb"]),
    "unknown storage": (put("model", "storage", "int3"), ["model.storage", "int3", "nf4", "int8"]),
    "unknown preset": (put("deepspeed", "preset", "zero5"), ["deepspeed.preset", "zero5", "zero3"]),
    "unknown format": (put("data", "format", "sharegpt"), ["data.format", "sharegpt", "alpaca", "chat"]),
    "unknown constraint": (put("subspace", "constraint", "mpc_x"), ["subspace.constraint", "mpc_x", "mpc_o"]),
    "unknown option": (put("subspace", "options", {"ini": 1}), ["ini", "lora", "init"]),
    "no target": (put("subspace", "target_modules", ["nothing"]), ["subspace.target_modules", "nothing", "q_proj"]),
    "rank 0": (put("subspace", "rank", 0), ["subspace.rank", "0"]),
    "rank too large": (put("subspace", "rank", 40), ["subspace.rank is 40", "k_proj", "at most 16"]),
    "no model folder": (put("model", "path", "/nowhere/model"), ["model.path", "/nowhere/model"]),
    "no weights": (no_weights, ["model.path", "no weights", "model.safetensors"]),
    "truncated": (truncate, ["model.safetensors", "whole"]),
    "tensor missing": (missing_tensor, ["model.layers.0.mlp.up_proj.weight"]),
    "tensor not in file": (tensor_not_in_file, ["lost.weight", "index"]),
    "shape contradicts": (other_shape, ["model.norm.weight", "[7]", "[32]"]),
    "pickle only": (pickle_only, ["pickle", "pytorch_model.bin", "safetensors"]),
    "no tokenizer": (no_tokenizer, ["tokenizer"]),
    "data missing": (put("data", "train", "/nowhere/data.jsonl"), ["data.train", "/nowhere/data.jsonl"]),
    "data empty": (records(" "), ["train.jsonl"]),
    "data not JSON": (records('{"instruction": "a", "output": "b"}\n{oops\n'), ["train.jsonl", "line 2"]),
    "column missing": (records('{"question": "a", "answer": "b"}\n'), ["instruction", "question", "answer"]),
    "nothing fits": (put("data", "max_length", 2), ["max_length"]),
    "batch no multiple": (put("training", "global_batch_size", 5), ["training.global_batch_size", "5", "2"]),
    "too few samples": (put("training", "global_batch_size", 4000), ["training.global_batch_size", "4000"]),
    "not writable": (file_in_the_way, ["run.output_dir"]),
    "dtype contradicts": (lambda c, f: c["model"].update(storage="fp16", dtype="float32"), ["model.dtype", "float32"]),
    "GPU optimizer": (put("training", "optim", "paged_adamw_8bit"), ["training.optim", "paged_adamw_8bit"]),
    "longer than the model": (put("data", "max_length", 4096), ["data.max_length", "4096", "128"]),
    "DeepSpeed JSON disagrees": (
        put("deepspeed", "config", {"train_micro_batch_size_per_gpu": 7, "zero_optimization": {"stage": 3}}),
        ["train_micro_batch_size_per_gpu", "7", "training.per_device_train_batch_size", "2"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_sentence(
    name: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, wanted = CASES[name]
    folder = tmp_path / "case"
    shutil.copytree(good, folder)
    config = configuration(folder)
    change(config, folder)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    assert train(file) == 2
    message = capfd.readouterr().err.strip().splitlines()
    sentence = message[-1]
    assert sentence.startswith("error: ")
    assert "Traceback" not in "\n".join(message)
    for word in wanted:
        assert word in sentence, sentence
    if (folder / "run").is_dir():
        assert read_status(folder / "run")["state"] == "refused"  # type: ignore[index]


def test_a_stored_run_of_another_method_model_or_data_is_refused_by_name(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "case"
    shutil.copytree(good, folder)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(configuration(folder)))
    assert train(file) == 0
    make_model(folder / "other", seed=1)
    make_records(folder / "other.jsonl", 30)
    changes = {
        "method": "subspace.method=ssl",
        "model": f"model.path={folder / 'other'}",
        "data": f"data.train={folder / 'other.jsonl'}",
    }
    for what, override in changes.items():
        capfd.readouterr()
        assert train(file, [override, "training.max_steps=2"]) == 2
        assert f"another {what}" in capfd.readouterr().err
    assert train(file, [changes["data"], "training.max_steps=2", "checkpoint.allow_different=[data]"]) == 0
