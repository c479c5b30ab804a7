"""A recipe as a person uses it: copied, with a model and data of their own on the command line, and run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from dist_subspace.run_folder.status import read_status
from dist_subspace.training.run import train
from tests.config.headers import RECIPES
from tests.config.own_data import chat_tokenizer, write_records
from tests.config.recipes import Recipe
from tests.config.shapes import SHAPES
from tests.ranks import ROOT, free_port, run_on_ranks
from tests.tiny_models import tiny_config

EVERY = [Recipe(path) for path in RECIPES]
QUICK = ("cpu-smoke", "roberta-large-sst2")  # in every run of the tests


def tiny_like(recipe: Recipe, folder: Path) -> Path:
    """A model of the recipe's family with byte tokens, and a tokenizer that knows a chat."""
    tokenizer = chat_tokenizer()
    shape, kind = SHAPES[recipe.config.model.path], "ForCausalLM"
    heads: dict[str, int] = {"num_key_value_heads": 2, "head_dim": 8}
    if recipe.config.subspace.target_parameters:
        heads |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    if recipe.config.model.task == "classification":
        kind, heads = "Model", {}
    marks = {"vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    config = tiny_config(type(shape).__name__, max_position_embeddings=128, **marks, **heads)
    torch.manual_seed(0)
    family = type(config).__name__.removesuffix("Config")
    getattr(transformers, family + kind)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own(recipe: Recipe, folder: Path) -> list[str]:
    """What is changed on the command line: the model, the data, and sizes that a tiny model has room for."""
    config = recipe.config
    file = write_records(folder / "train.jsonl", recipe.config.data.format, 400)
    micro = min(config.training.per_device_train_batch_size, 4)
    changes = {
        "model.path": tiny_like(recipe, folder / "model"),
        "data.train": file,
        "data.eval": 0.02,
        "data.max_length": 64,
        "training.global_batch_size": 4 * micro,
        "training.per_device_train_batch_size": micro,
        "training.num_train_epochs": "null",
        "training.max_steps": 2,
        "run.output_dir": folder / "run",
    }
    if (config.subspace.rank or 0) > 8:
        changes["subspace.rank"] = 8
    return [f"{name}={value}" for name, value in changes.items()]


def run_here(path: str, overrides: list[str]) -> tuple[int, str]:
    """On a rank of a node of two, as a launcher says it."""
    with (
        pytest.MonkeyPatch.context() as environment,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(out),
    ):
        environment.setenv("LOCAL_RANK", str(int(os.environ["RANK"]) % 2))
        environment.setenv("LOCAL_WORLD_SIZE", "2")
        status = train(path, overrides)
    return status, out.getvalue()


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=recipe.path.stem, marks=[] if recipe.path.stem in QUICK else [pytest.mark.slow])
        for recipe in EVERY
    ],
)
def test_a_recipe_trains_with_a_model_and_data_of_ones_own(recipe: Recipe, tmp_path: Path) -> None:
    copied = tmp_path / "mine.yaml"
    shutil.copy(recipe.path, copied)
    ranks = 2 * recipe.hardware.nodes
    (status, said), *_ = run_on_ranks(ranks, run_here, str(copied), own(recipe, tmp_path))
    assert status == 0, said
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for section, key in (
        ("subspace", "method"),
        ("model", "storage"),
        ("deepspeed", "preset"),
        ("training", "learning_rate"),
    ):
        assert resolved[section][key] == getattr(getattr(recipe.config, section), key)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in lines)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_smoke_runs_as_its_header_says(tmp_path: Path) -> None:
    """Both lines, to the letter, in a folder that has nothing but this one's scripts and recipes."""
    said = next(recipe.said for recipe in EVERY if recipe.path.stem == "cpu-smoke")
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    start, port = said["Start"], free_port()
    start = start.replace("--num_accelerators 2", f"--num_accelerators 2 --master_addr 127.0.0.1 --master_port {port}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("DS_ACCELERATOR", None)
    for line in (said["Set-up"], start):
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "runs" / "cpu-smoke"
    status = read_status(run)
    assert status is not None and status["state"] == "finished"
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained, held_out = ([line[key] for line in losses if key in line] for key in ("loss", "eval_loss"))
    assert trained and held_out[-1] < held_out[0] and (run / "adapter").is_dir()
