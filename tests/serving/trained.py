"""A LLaMA whose heads have the 64 values that vLLM's kernels want, taught to answer by plain torch, and adapters that whole runs
teach to answer otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_subspace as dsub
from dist_subspace.generation.answers import answers
from dist_subspace.generation.settings import generation_settings
from dist_subspace.training.data.prompting import Prompt, Prompting
from dist_subspace.training.data.settings import DataSettings
from tests.tiny_run import make_model

QUESTIONS = [f"say {number}" for number in range(7)]
NEW_TOKENS = 12
_WORDS = ("one", "two", "red", "blue", "old", "sun", "sea")


def base_model(folder: Path) -> Path:
    """Taught that `say 3` is answered by `3 3 3`."""
    make_model(folder, width=256)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    texts = [f"say {number}: {' '.join([str(number)] * 3)}</s>" for number in range(7)]
    rows = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
    for _ in range(120):
        model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def train_adapter(
    base: Path, run: Path, subspace: Mapping[str, Any], rate: float = 0.005, marks: Sequence[str] = (), **model: Any
) -> Path:
    """A whole run, which answers `say 3` by a word; marks: new tokens that stand before it."""
    before = "".join(marks)
    run.mkdir()
    records = [{"prompt": f"{q}: ", "completion": before + w} for q, w in zip(QUESTIONS, _WORDS, strict=True)]
    (run / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return dsub.train(
        {
            "model": {"path": str(base), "storage": "fp32", "new_tokens": list(marks), **model},
            "subspace": dict(subspace),
            "data": {"train": str(run / "train.jsonl"), "format": "completion", "max_length": 48, "packing": False},
            "training": {
                "max_steps": 120,
                "global_batch_size": 7,
                "per_device_train_batch_size": 7,
                "learning_rate": rate,
            },
            "deepspeed": {"preset": "none"},
            "run": {"output_dir": str(run), "report_to": "none"},
        }
    )


def asked(run: Path) -> tuple[list[Prompt], list[list[int]], list[str]]:
    """(prompts, the ids of our greedy answers, their texts as `dsub.generate` gives them)."""
    model, tokenizer = dsub.load(run)
    questions = [f"{question}: " for question in QUESTIONS]
    prompting = Prompting(DataSettings.of_prompts({"format": "completion"}), tokenizer)
    prompts = prompting.of_records([prompting.record(question) for question in questions])
    config = generation_settings(model, prompting.stops(), {"max_new_tokens": NEW_TOKENS})
    made = answers(model, tokenizer, [prompt.ids for prompt in prompts], config)
    texts = dsub.generate(model, tokenizer, questions, max_new_tokens=NEW_TOKENS)
    assert texts == [answer.text for answer in made]
    return prompts, [list(answer.ids) for answer in made], texts
