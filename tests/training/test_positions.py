"""Runs on models whose positions do not begin at 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import RobertaForCausalLM, RobertaForSequenceClassification

from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.training.run import train
from tests.tiny_models import tiny_config
from tests.tiny_run import make_tokenizer

STATED = 33  # one of them is before the first token's: the padding is id 0, which no sample has


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("positions")
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": STATED, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = tiny_config("RobertaConfig", is_decoder=True, **sizes)
    RobertaForCausalLM(config).save_pretrained(path / "causal")
    config.is_decoder = False
    RobertaForSequenceClassification(config).save_pretrained(path / "classify")
    for name in ("causal", "classify"):
        tokenizer.save_pretrained(path / name)
    rows = [{"text": "ab" * (n + 2), "label": n % 2} for n in range(8)]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configuration(folder: Path, run: Path, name: str, **data: Any) -> dict[str, Any]:
    classify = name == "classify"
    return {
        "model": {
            "path": str(folder / name),
            "storage": "fp32",
            "task": "classification" if classify else "causal-lm",
        },
        "subspace": {"method": "lora", "rank": 2},
        "data": {
            "train": str(folder / "train.jsonl"),
            "format": "classification" if classify else "text",
            "max_length": STATED - 1,
            "packing": False,
        }
        | data,
        "training": {"max_steps": 1, "global_batch_size": 8, "per_device_train_batch_size": 8},
        "deepspeed": {"preset": "zero0"},
        "run": {"output_dir": str(run), "logging_steps": 1, "report_to": "none"},
    }


@pytest.mark.parametrize("name", ["causal", "classify"])
def test_rows_of_all_positions_train_and_longer_ones_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    assert train(configuration(folder, tmp_path / "fits", name)) == EXIT_OK
    for longer in (STATED, STATED + 1):
        run = tmp_path / str(longer)
        assert train(configuration(folder, run, name, max_length=longer)) == EXIT_USAGE
        sentence = f"data.max_length is {longer}; accepted: at most {STATED - 1}, the model's positions"
        assert read_status(run)["message"] == sentence  # type: ignore[index]


def test_the_loss_is_that_of_the_positions_that_transformers_gives(folder: Path, tmp_path: Path) -> None:
    assert train(configuration(folder, tmp_path, "causal")) == EXIT_OK
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    model = RobertaForCausalLM.from_pretrained(folder / "causal").eval()
    tokenizer, losses = make_tokenizer(), []
    for n in range(8):
        ids = torch.tensor([[*tokenizer("ab" * (n + 2))["input_ids"], tokenizer.eos_token_id]])[:, : STATED - 1]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        losses.append(cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none"))
    assert line["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_packing_is_refused_where_a_sample_cannot_begin_anew(folder: Path, tmp_path: Path) -> None:
    assert train(configuration(folder, tmp_path, "causal", packing=True)) == EXIT_USAGE
    said = read_status(tmp_path)["message"]  # type: ignore[index]
    assert said.startswith("data.packing is true, but the positions of this model begin at 1")
