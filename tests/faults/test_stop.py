"""A stop that one rank is told is everyone's, in every phase: between micro-batches, in an evaluation, while one rank works
for all. Ranks of this process's pools; real launchers are in test_signals.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM

from dist_subspace.placement.collectives import gather_objects, known_peers, on_main, world
from dist_subspace.placement.peers import join
from dist_subspace.run_folder.status import EXIT_INTERRUPTED, EXIT_OK, read_status
from dist_subspace.run_folder.trainer_state import read_trainer_state
from dist_subspace.stopping import Interrupted, listening
from dist_subspace.subspace import attachment
from dist_subspace.training import pause
from dist_subspace.training.run import train
from tests.ranks import run_on_ranks
from tests.tiny_run import make_model, make_records

MICRO_BATCHES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stop")
    make_model(path / "model")
    make_records(path / "train.jsonl", 60)
    make_records(path / "eval.jsonl", 12)
    return path


def configuration(folder: Path, run: Path, preset: str = "zero3", method: str = "lora") -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32"},
        "subspace": {"method": method, "dropout": 0.1},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": 48,
            "packing": False,
            "cache_dir": str(folder / "tokens"),
        },
        "training": {
            "max_steps": 3,
            "global_batch_size": MICRO_BATCHES,
            "per_device_train_batch_size": 1,
            "learning_rate": 0.01,
            "gradient_checkpointing": False,
        },
        "deepspeed": {"preset": preset},
        "checkpoint": {"save_steps": 3},
        "run": {"output_dir": str(run), "logging_steps": 1, "eval_steps": 2, "report_to": "none"},
    }


def told_at(config: dict[str, Any], rank: int, training: bool, call: int) -> int:
    """One run; `rank` gets a SIGTERM in its own `call`-th forward of training, or of evaluation. All ranks ask at every
    micro-batch, however fast these are."""
    seen = 0

    def count(module: nn.Module, inputs: object) -> None:
        nonlocal seen
        ours = isinstance(module, LlamaForCausalLM) and attachment(module) is not None  # no probe of the configuration
        if ours and module.training == training and world().rank == rank:
            seen += 1
            if seen == call:
                os.kill(os.getpid(), signal.SIGTERM)

    hook, usual = register_module_forward_pre_hook(count), pause.SECONDS
    pause.SECONDS = 0.0
    try:
        return train(config)
    finally:
        pause.SECONDS = usual
        hook.remove()


def run_here(config: dict[str, Any]) -> int:
    return train(config)


def records(run: Path) -> list[dict[str, Any]]:
    """What was measured, without the clock's part of it."""
    timed = ("tokens_per_second", "peak_memory_bytes", "elapsed_seconds")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_same_end(run: Path, whole: Path) -> None:
    assert records(run) == records(whole)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = load_file(run / "checkpoint-3" / name), load_file(whole / "checkpoint-3" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("ranks", "preset", "method"),
    [
        (2, "zero3", "lora"),
        pytest.param(1, "zero0", "lora", marks=pytest.mark.slow),
        pytest.param(3, "zero2", "lora", marks=pytest.mark.slow),
        pytest.param(4, "zero3", "lora", marks=pytest.mark.slow),  # in the eighth round two ranks idle
        pytest.param(2, "zero1", "adalora", marks=pytest.mark.slow),
        pytest.param(2, "zero2", "lora-dash", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_anywhere_goes_on_to_the_same_bits(
    ranks: int, preset: str, method: str, folder: Path, tmp_path: Path
) -> None:
    """In the middle of the second step's accumulation; then in the evaluation after it, which the third start makes up for."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_on_ranks(ranks, run_here, configuration(folder, whole, preset, method)) == [EXIT_OK] * ranks
    config = configuration(folder, parts, preset, method)
    rounds = -(-MICRO_BATCHES // ranks)
    in_second_step = rounds + rounds // 2
    assert run_on_ranks(ranks, told_at, config, ranks - 1, True, in_second_step) == [EXIT_INTERRUPTED] * ranks
    assert_interrupted(parts, 1, "SIGTERM")
    written = (parts / "checkpoint-1" / "MANIFEST.json").stat().st_mtime_ns
    priming = 2  # forwards of the start, which makes the optimizer's moments
    assert run_on_ranks(ranks, told_at, config, ranks - 1, True, priming) == [EXIT_INTERRUPTED] * ranks
    assert_interrupted(parts, 1, "SIGTERM")
    assert (parts / "checkpoint-1" / "MANIFEST.json").stat().st_mtime_ns == written, "it was there already"
    assert run_on_ranks(ranks, told_at, config, 0, False, 2) == [EXIT_INTERRUPTED] * ranks
    assert_interrupted(parts, 2, "SIGTERM")
    assert read_trainer_state(parts / "checkpoint-2").unevaluated
    assert [line["step"] for line in records(parts) if "eval_loss" in line] == [0]
    assert run_on_ranks(ranks, run_here, config) == [EXIT_OK] * ranks
    assert_same_end(parts, whole)


def assert_interrupted(run: Path, step: int, reason: str) -> None:
    status = read_status(run)
    assert status is not None and (status["state"], status["step"]) == ("interrupted", step)
    assert reason in status["message"] and f"after step {step}" in status["message"]


def test_a_run_that_is_told_before_its_first_whole_step_leaves_nothing_to_save(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path / "run")
    assert run_on_ranks(2, told_at, config, 1, False, 2) == [EXIT_INTERRUPTED] * 2  # in the evaluation at step 0
    assert run_on_ranks(2, told_at, config, 0, True, 3) == [EXIT_INTERRUPTED] * 2
    status = read_status(tmp_path / "run")
    assert status is not None and status["state"] == "interrupted" and "before the first step" in status["message"]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_checkpoint_of_a_step_whose_evaluation_is_done_says_so(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path / "run")
    config["training"]["max_steps"] = 2
    assert train(config) == EXIT_OK
    assert not read_trainer_state(tmp_path / "run" / "checkpoint-2").unevaluated
    shutil.rmtree(tmp_path / "run")


def told_while_rank_0_works(told: int) -> tuple[str, float, bool]:
    """Rank 0 works for all, in one long call without an end; `told` gets a SIGTERM, and no other rank does."""
    began = time.monotonic()

    def work() -> None:
        for _ in range(600):
            time.sleep(0.1)

    with listening() as stop:
        peers = join(stop)
        assert peers is not None
        if world().rank == told:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with stop.watching(peers.look), known_peers(peers), stop.leavable():
            try:
                on_main(work)
            except Interrupted as interrupted:
                found = str(interrupted)
            else:
                found = "nothing"
    return found, time.monotonic() - began, gather_objects(1) == [1, 1]


@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_ends_what_one_rank_does_for_all_whichever_rank_is_told(told: int) -> None:
    for reason, seconds, whole in run_on_ranks(2, told_while_rank_0_works, told):
        assert reason == "signal SIGTERM" and seconds < 15 and whole
