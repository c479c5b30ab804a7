"""A recipe's peak, as its header estimates it, is not passed by a model of its real size with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_subspace.run_folder.status import read_status
from dist_subspace.training.run import train
from tests.config.headers import RECIPES
from tests.config.own_data import chat_tokenizer, write_records
from tests.config.recipes import OUTSIDE, Recipe
from tests.config.shapes import SHAPES
from tests.gpu.device import DEVICE


@pytest.mark.parametrize("name", ["llama-3.2-1b-8gb"])
def test_a_step_stays_below_the_peak_of_a_recipes_header(name: str, tmp_path: Path) -> None:
    recipe = next(Recipe(path) for path in RECIPES if path.stem == name)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(SHAPES[recipe.config.model.path], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    del model
    changes = {
        "model.path": tmp_path / "model",
        "data.train": write_records(tmp_path / "train.jsonl", recipe.config.data.format, 2000),
        "data.eval": "null",
        "training.global_batch_size": recipe.config.training.per_device_train_batch_size,
        "training.num_train_epochs": "null",
        "training.max_steps": 3,
        "run.output_dir": tmp_path / "run",
    }
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    status = train(recipe.path, [f"{key}={value}" for key, value in changes.items()])
    assert status == 0, read_status(tmp_path / "run")
    peak, estimated = torch.cuda.max_memory_allocated(DEVICE) - before, recipe.peak - OUTSIDE
    assert 0.5 * estimated < peak < estimated
