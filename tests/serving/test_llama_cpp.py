"""llama.cpp, which Ollama runs, writes what our model writes: from a merged model that its own converter has converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dist_subspace as dsub
from tests.serving.servers import run_llama_cpp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPTS = ["Once upon a time", "The dog was", "KING:"]
TOKENS = 24


def test_a_merged_pretrained_model_writes_our_text(
    serving_python: Path, stories260k: Path, data_dir: Path, tmp_path: Path
) -> None:
    """A DoRA that tells Shakespeare, which no adapter file of llama.cpp holds."""
    text = (data_dir / "text" / "tinyshakespeare.txt").read_text()
    records = [{"text": text[start : start + 300]} for start in range(0, 60_000, 300)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = dsub.train(
        {
            "model": {"path": str(stories260k), "storage": "fp32"},
            "subspace": {"method": "dora", "rank": 8},
            "data": {"train": str(tmp_path / "train.jsonl"), "format": "text", "max_length": 128, "packing": False},
            "training": {
                "max_steps": 30,
                "global_batch_size": 8,
                "per_device_train_batch_size": 8,
                "learning_rate": 5e-3,
            },
            "deepspeed": {"preset": "none"},
            "run": {"output_dir": str(tmp_path / "run"), "report_to": "none"},
        }
    )
    model, tokenizer = dsub.load(run)
    ours = dsub.generate(model, tokenizer, PROMPTS, max_new_tokens=TOKENS)
    with dsub.disabled(model):
        assert dsub.generate(model, tokenizer, PROMPTS, max_new_tokens=TOKENS) != ours, "the adapter changes nothing"
    dsub.merge(model, tmp_path / "merged", report=None)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert run_llama_cpp(tmp_path, tmp_path / "merged", prompts, TOKENS) == ours
