"""Runs with new tokens and virtual ones: the tokenizer, the tokenised data, what is refused, the final adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import dist_subspace as dsub
from dist_subspace.loading.tokenizer import load_tokenizer
from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.training.run import train
from tests.ranks import run_on_ranks
from tests.tiny_run import POSITIONS, make_bert, make_model

MARKS = ["<|im_start|>", "<|im_end|>"]
KNOWN = 258  # of the base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens")
    make_model(path / "model")
    rows = [{"prompt": f"{MARKS[0]}say {n}{MARKS[1]}", "completion": f"{n} {MARKS[1]}"} for n in range(30)]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configuration(folder: Path, run: Path, **subspace: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32", "new_tokens": MARKS},
        "subspace": {"method": "lora", "rank": 2} | subspace,
        "data": {"train": str(folder / "train.jsonl"), "format": "completion", "max_length": 48},
        "training": {"max_steps": 4, "global_batch_size": 2, "learning_rate": 0.05},
        "deepspeed": {"preset": "zero0"},
        "checkpoint": {"save_steps": 2},
        "run": {"output_dir": str(run), "logging_steps": 1, "report_to": "none"},
    }


def test_a_run_trains_the_new_rows_and_its_adapter_has_the_larger_tokenizer(folder: Path, tmp_path: Path) -> None:
    assert train(configuration(folder, tmp_path)) == EXIT_OK
    tokenizer = load_tokenizer(str(tmp_path / "adapter"))
    assert tokenizer.convert_tokens_to_ids(MARKS) == [KNOWN, KNOWN + 1] and len(tokenizer) == KNOWN + 2
    assert len(load_tokenizer(str(folder / "model"))) == KNOWN
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = tensors["base_model.model.new_tokens.embedding"]
    assert rows.shape == (2, 32) and not torch.equal(rows[0], rows[1])
    model = dsub.load_adapter(dsub.load_frozen(folder / "model", storage="fp32"), tmp_path / "adapter")
    ids = tokenizer(f"{MARKS[0]}say 3{MARKS[1]}", return_tensors="pt")["input_ids"]
    said = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert said.shape[1] == ids.shape[1] + 3 and model(input_ids=said).logits.shape[-1] == KNOWN + 2


def test_data_is_tokenised_with_the_new_tokens_whatever_was_cached_before(folder: Path, tmp_path: Path) -> None:
    lengths = []
    for tokens in ([], MARKS):
        config = configuration(folder, tmp_path / str(len(tokens)))
        config["model"]["new_tokens"] = tokens
        config["data"] |= {"cache_dir": str(tmp_path / "cache"), "packing": False}
        assert train(config) == EXIT_OK
        line = (tmp_path / str(len(tokens)) / "metrics.jsonl").read_text().splitlines()[-1]
        lengths.append(json.loads(line)["tokens"])
    assert lengths[1] < lengths[0]


def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    whole, parts = configuration(folder, tmp_path / "whole"), configuration(folder, tmp_path / "parts")
    assert train(whole) == EXIT_OK and train(parts) == EXIT_OK
    for file in (tmp_path / "parts" / "checkpoint-4").iterdir():
        file.unlink()
    (tmp_path / "parts" / "checkpoint-4").rmdir()
    assert train(parts) == EXIT_OK
    one, other = (load_file(tmp_path / run / "checkpoint-4" / "optimizer.safetensors") for run in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_virtual_tokens_train_in_packed_rows(method: str, folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, method=method, rank=None, options={"num_virtual_tokens": 3})
    assert train(config) == EXIT_OK
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_a_prompt_begins_with_the_text_that_the_tokenizer_reads(folder: Path, tmp_path: Path) -> None:
    options = {"num_virtual_tokens": 3, "init": "text", "init_text": f"a{MARKS[0]}"}
    config = configuration(folder, tmp_path, method="prompt", rank=None, options=options)
    config["training"]["max_steps"] = 1
    assert train(config) == EXIT_OK
    described = json.loads((tmp_path / "adapter" / "dist_subspace.json").read_text())
    tokenizer = load_tokenizer(str(folder / "model"))
    assert described["options"]["init_ids"] == [*tokenizer.convert_tokens_to_ids(["a"]), KNOWN]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"new_tokens": ["a ", "a "]}, "model.new_tokens has 'a '; accepted: texts that are not blank, each once"),
        ({"new_tokens": [" "]}, "model.new_tokens has ' '; accepted: texts that are not blank, each once"),
    ],
)
def test_bad_new_tokens_are_refused(change: dict[str, Any], sentence: str, folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path)
    config["model"] |= change
    assert train(config) == EXIT_USAGE
    assert read_status(tmp_path)["message"] == sentence  # type: ignore[index]


def test_rows_that_leave_no_position_for_virtual_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, method="prompt", rank=None)
    config["data"]["max_length"] = POSITIONS - 19
    assert train(config) == EXIT_USAGE
    assert read_status(tmp_path)["message"] == (  # type: ignore[index]
        f"data.max_length is {POSITIONS - 19}; accepted: at most {POSITIONS - 20}, the model's positions less the 20 virtual "
        "tokens of method prompt"
    )


def test_a_token_that_is_known_already_is_said_to_begin_anew(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(folder, tmp_path)
    config["model"]["new_tokens"] = ["a"]
    config["training"]["max_steps"] = 1
    assert train(config) == EXIT_OK
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "model.new_tokens has a, which the tokenizer knows already: their rows begin anew" in shown


def run_here(config: dict[str, Any]) -> int:
    return train(config)


@pytest.mark.parametrize(("method", "ranks"), [("prompt", 1), ("prefix", 2)])
def test_an_encoder_learns_to_classify_by_virtual_tokens_and_new_ones(method: str, ranks: int, tmp_path: Path) -> None:
    make_bert(tmp_path / "model", BertForSequenceClassification)
    rows = [{"text": f"{MARKS[n % 2]} {n % 5}", "label": "yes" if n % 2 else "no"} for n in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = configuration(tmp_path, tmp_path / "run", method=method, rank=None, options={"num_virtual_tokens": 3})
    values["model"] |= {"task": "classification", "storage": "nf4"}
    values["data"] = {"train": str(tmp_path / "train.jsonl"), "format": "classification", "eval": 0.2, "max_length": 32}
    values["training"] |= {"max_steps": 40, "global_batch_size": 8, "per_device_train_batch_size": 2}
    values["deepspeed"], values["checkpoint"] = {"preset": "zero3"}, {"save_steps": 40}
    assert run_on_ranks(ranks, run_here, values) == [EXIT_OK] * ranks
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_accuracy"] > 0.9
    model = dsub.load_frozen(tmp_path / "model", storage="nf4", task="classification", num_labels=2, device="cpu")
    model = dsub.load_adapter(model, tmp_path / "run" / "adapter")
    larger = load_tokenizer(str(tmp_path / "run" / "adapter"))
    inputs = larger([f"{MARKS[1]} 3", f"{MARKS[0]} 3"], return_tensors="pt")
    with torch.no_grad():
        assert model(input_ids=inputs["input_ids"]).logits.argmax(-1).tolist() == [1, 0]
