"""Signals under real launchers: what a person or a scheduler does to a run, and what it leaves. They come in the middle of a
step of many micro-batches, and in the long phases before the first one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.faults.launched import Launched, launched, write_config
from tests.tiny_run import make_records, make_tokenizer

PATIENCE = 28.0  # seconds: torchrun and deepspeed kill after 30


def to_launcher(run: Launched) -> None:
    """What `kill` does to the process that the person started."""
    run.process.send_signal(signal.SIGTERM)


def to_deepspeeds_own(run: Launched) -> None:
    """The process between the deepspeed command and the ranks: it terminates one rank after the other."""
    own = [p for p in run.all() if any("deepspeed.launcher.launch" in word for word in p.cmdline())]
    own[0].send_signal(signal.SIGTERM)


def ctrl_c(run: Launched) -> None:
    """A terminal's Ctrl-C goes to every process in the foreground."""
    for process in run.all():
        process.send_signal(signal.SIGINT)


def to_rank_1(run: Launched) -> None:
    run.ranks()[1].send_signal(signal.SIGUSR1)


def launcher_dies(run: Launched) -> None:
    run.process.send_signal(signal.SIGKILL)


STOPS: list[tuple[str, Callable[[Launched], None], str]] = [
    ("torchrun", to_launcher, "signal SIGTERM"),
    ("torchrun", ctrl_c, "signal SIGINT"),
    ("torchrun", to_rank_1, "signal SIGUSR1"),
    ("torchrun", launcher_dies, "the end of its launcher"),
    ("deepspeed", to_launcher, "the end of its launcher"),
    ("deepspeed", to_deepspeeds_own, "signal SIGTERM"),
    ("deepspeed", ctrl_c, "signal SIG"),
]


def in_the_second_step(run: Launched) -> None:
    run.until(run.says("step 1/3"))
    time.sleep(0.3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    with launched("torchrun", write_config(folder)) as run:
        run.ended(300)
        assert run.process.returncode == 0, run.output()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stop", "reason"), STOPS, ids=[f"{n}-{s.__name__}" for n, s, _ in STOPS])
def test_a_run_that_is_stopped_in_a_step_saves_the_last_whole_one_and_goes_on_to_the_same_bits(
    name: str, stop: Callable[[Launched], None], reason: str, whole: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    with launched(name, config) as run:
        in_the_second_step(run)
        began = time.monotonic()
        stop(run)
        run.ended(60)
        assert time.monotonic() - began < PATIENCE
        status = run.status()
        assert (status["state"], status["step"]) == ("interrupted", 1), status
        assert reason in status["message"]
        assert (
            "error: " not in run.output() and "dist_subspace/training/run.py" not in run.output()
        )  # no traceback of ours
    with launched("torchrun", config) as run:
        run.ended(300)
        assert run.process.returncode == 0 and run.status()["state"] == "finished", run.output()
        assert len(run.losses()) == 3
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / "run" / "checkpoint-3" / file) for folder in (tmp_path, whole))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_a_rank_that_is_killed_is_named_in_the_status_with_the_last_whole_step(
    name: str, rank: int, tmp_path: Path
) -> None:
    with launched(name, write_config(tmp_path, checkpoint={"save_steps": 1})) as run:
        in_the_second_step(run)
        victim = run.ranks()[rank]
        victim.send_signal(signal.SIGKILL)
        run.ended(60)
        status = run.status()
        assert (status["state"], status["rank"], status["step"]) == ("failed", rank, 1), status
        assert f"rank {rank} (process {victim.pid} on " in status["message"]
        assert "checkpoint-1" in status["message"]
        assert run.output().count("error: rank") == 1


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose load and decompositions take many seconds, and records whose tokenisation does."""
    folder = tmp_path_factory.mktemp("heavy")
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 8}
    marks = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **marks)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make_records(folder / "many.jsonl", 600_000)
    make_records(folder / "held-out.jsonl", 20_000)
    return folder


PHASES: list[tuple[str, str, list[str]]] = [
    ("starting", "the imports", []),
    ("configuration", "tokenising", ["data.train={heavy}/many.jsonl"]),
    ("3 steps of", "the load", ["model.path={heavy}/model", "model.storage=nf4"]),
    ("reading the model: done", "decompositions", ["model.path={heavy}/model", "subspace.method=pissa"]),
    ("method lora", "an evaluation", ["data.eval={heavy}/held-out.jsonl"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("after", "phase", "overrides"), PHASES, ids=[phase for _, phase, _ in PHASES])
def test_a_stop_in_a_long_phase_before_the_first_step_is_heard_at_once(
    after: str, phase: str, overrides: list[str], heavy: Path, tmp_path: Path
) -> None:
    """Only one rank is told: the launcher has to wait for both."""
    with launched("torchrun", write_config(tmp_path), *(text.format(heavy=heavy) for text in overrides)) as run:
        run.until(run.says(after))
        time.sleep(1.0)
        began = time.monotonic()
        told = run.ranks()[1] if phase != "the imports" else psutil.Process(run.process.pid)
        told.send_signal(signal.SIGTERM)
        run.ended(60)
        assert time.monotonic() - began < PATIENCE
        assert "error: " not in run.output() and "dist_subspace/training/run.py" not in run.output()
        if phase == "the imports":
            return  # there is no run yet, whose status could say so
        assert run.status()["state"] == "interrupted"
        assert "before the first step" in run.status()["message"]
