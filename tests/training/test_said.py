"""What a person learns of a run: on the screen, from its status while it lasts, from a tracker, and from the adapter's card."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM

from dist_subspace.checkpoint import occupancy
from dist_subspace.run_folder import RunFolder
from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.subspace import attachment, methods
from dist_subspace.training import trackers
from dist_subspace.training.run import train
from tests.tiny_run import make_model
from tests.whole_runs import records, rewritten

STEPS, ROUNDS = 4, 2


@dataclass
class Told:
    """said: on the screen. status: of each step, what RUN/status.json said at its beginning, once it knew of the step before."""

    run: Path
    said: str = ""
    status: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return self.said.splitlines()


class Written:
    """A tracker of one's own: what it is told, in a file."""

    def __init__(self, run: RunFolder, config: Mapping[str, Any], resume_step: int) -> None:
        self.file = (run.path / "tracked.jsonl").open("a")
        self._write({"config": config, "after": resume_step})

    def _write(self, told: dict[str, Any]) -> None:
        self.file.write(json.dumps(told, default=str) + "\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._write({"step": step, **values})

    def picture(self, name: str, file: Path, step: int) -> None:
        self._write({"picture": name, "bytes": file.stat().st_size, "at": step})

    def close(self) -> None:
        self._write({"closed": True})
        self.file.close()


def configuration(folder: Path) -> dict[str, Any]:
    training = {"max_steps": STEPS, "global_batch_size": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32"},
        "subspace": {"method": "dora", "rank": 2, "constraint": "mpc_o", "target_modules": ["q_proj"]},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "format": "chat",
            "max_length": 64,
            "packing": False,
        },
        "training": training
        | {"lr_scheduler_type": "linear", "warmup_steps": 50, "seed": 3, "gradient_checkpointing": False},
        "deepspeed": {"preset": "zero0"},
        "checkpoint": {"save_steps": 2},
        "run": {"output_dir": str(folder / "run"), "logging_steps": 2, "eval_steps": 2, "report_to": ["tensorboard"]},
    }


def conversations(file: Path, count: int) -> None:
    rows = [
        [{"role": "user", "content": "say " * (1 + n % 2 * 12)}, {"role": "assistant", "content": f"{n % 10} " * 4}]
        for n in range(count)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


@contextlib.contextmanager
def looked_at(told: Told, after: int) -> Iterator[None]:
    """At the beginning of each step that follows `after`, and before the first of all: the status."""
    calls, late = 0, False

    def look(module: nn.Module, inputs: object) -> None:
        nonlocal calls, late
        if not (isinstance(module, LlamaForCausalLM) and attachment(module) is not None and module.training):
            return
        if calls % ROUNDS == 0:
            primes = after > 0 and len(told.status) > 0  # a run that goes on makes the optimizer's moments first
            expected, until = after + len(told.status) - primes, time.monotonic() + 20
            while (found := read_status(told.run) or {})["step"] != expected and time.monotonic() < until and not late:
                time.sleep(0.02)
            late |= found["step"] != expected
            told.status.append(found)
        calls += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(occupancy, "BEAT", 0.05)
        patch.setitem(trackers.KINDS, "tensorboard", Written)
        hook = register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()


def run_of(config: dict[str, Any], after: int = 0, expect: int = EXIT_OK) -> Told:
    told = Told(Path(config["run"]["output_dir"]))
    with looked_at(told, after), contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = train(config)
    told.said = out.getvalue()
    assert status == expect, told.said[-3000:]
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("said")
    make_model(path / "model", layers=1)
    conversations(path / "train.jsonl", 12)
    conversations(path / "eval.jsonl", 3)
    return path


@pytest.fixture(scope="module")
def first(folder: Path) -> Told:
    return run_of(configuration(folder))


def test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings(first: Told) -> None:
    assert "4 steps of 4 samples (2 micro-batches in 2 rounds on 1 ranks)" in first.lines
    assert any(line.startswith("warning: data.max_length 64 cuts 6 of 12 samples (50.0%)") for line in first.lines)
    assert any("chat template" in line and not line.startswith(" ") for line in first.lines)
    assert f"mpc_o on dora: {methods()['dora'].notices['mpc_o']}" in first.lines
    warmup = (
        "warning: training.warmup_steps is 50 of 4 steps: the run ends in its warm-up, with a learning rate of at most"
    )
    assert sum(line.startswith(warmup) for line in first.lines) == 1
    assert any(line.startswith("reading the model: done in ") for line in first.lines)
    trained = load_file(first.run / "adapter" / "adapter_model.safetensors")
    (row,) = (line for line in first.lines if " q_proj " in line)
    assert f" {sum(tensor.numel() for tensor in trained.values()):,} " in row and "method dora" in first.lines


def test_every_logged_step_evaluation_and_checkpoint_is_on_the_screen(first: Told) -> None:
    steps = [line for line in records(first.run) if "loss" in line]
    shown = [line for line in first.lines if line.startswith("step ")]
    assert [line["step"] for line in steps] == [1, 2, 4] and len(shown) == 3
    for line, text in zip(steps, shown, strict=True):
        where = f"step {line['step']}/{STEPS} | epoch {line['epoch']:.2f}"
        figures = f"{where} | loss {line['loss']:.4f} | penalty {line['penalty']:.4f} | lr "
        assert text.startswith(figures) and text.endswith(" left")
        assert line["penalty"] > 0
    for line in (line for line in records(first.run) if "eval_loss" in line):
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
        before = "" if line["step"] else " (before training)"
        measured = f"loss {line['eval_loss']:.4f} | perplexity {line['eval_perplexity']:.4f}"
        text = f"evaluation at step {line['step']}{before} | {measured}"
        assert text in first.lines
    for step in (2, 4):
        assert f"saved {first.run / f'checkpoint-{step}'}" in first.lines


def test_the_speed_of_a_step_is_in_tokens_of_the_batch(first: Told) -> None:
    """A line's tokens took its part of the run's time at least; a batch has many times more tokens than samples."""
    lines = [line for line in records(first.run) if "loss" in line]
    for before, line in zip([None, *lines], lines):
        tokens = line["tokens"] - (before["tokens"] if before else 0)
        seconds = tokens / line["tokens_per_second"]
        assert 0 < seconds <= line["elapsed_seconds"] - (before["elapsed_seconds"] if before else 0) + 1e-3


def test_the_end_names_the_adapter_and_the_picture(first: Told) -> None:
    last = first.lines[-3:]
    assert last[0] == "finished after step 4"
    assert [line.split() for line in last[1:]] == [
        ["adapter:", str(first.run / "adapter"), "(of", "checkpoint-4,", "the", "last)"],
        ["loss", "curve:", str(first.run / "loss.png")],
    ]
    assert (first.run / "loss.png").stat().st_size > 5000


def test_the_card_of_the_adapter_says_how_it_was_trained(first: Told) -> None:
    card = (first.run / "adapter" / "README.md").read_text()
    tokens = (
        records(first.run)[-1].get("tokens") or [line["tokens"] for line in records(first.run) if "loss" in line][-1]
    )
    rows = {"steps": "4", "samples": "16", "tokens": f"{tokens:,}", "global batch size": "4", "learning rate": "0.01"}
    rows |= {
        "schedule": "linear",
        "storage of the frozen weights": "fp32",
        "DeepSpeed": "zero0",
        "ranks": "1",
        "seed": "3",
    }
    for name, value in rows.items():
        assert f"| {name} | {value} |" in card


def test_the_status_of_a_run_that_lasts_knows_its_last_whole_step(first: Told) -> None:
    assert [(found["state"], found["step"]) for found in first.status] == [("running", step) for step in range(STEPS)]
    losses = [line["loss"] for line in records(first.run) if "loss" in line]
    assert [found.get("total_steps") for found in first.status] == [None, STEPS, STEPS, STEPS]
    assert first.status[1]["loss"] == pytest.approx(losses[0]) and first.status[1]["epoch"] == pytest.approx(
        4 / 12, abs=1e-4
    )
    assert first.status[1]["seconds_left"] > 0 and "total_steps" not in (read_status(first.run) or {})


def test_a_tracker_gets_the_configuration_every_figure_and_its_end(first: Told) -> None:
    begun, *told, picture, ended = map(json.loads, (first.run / "tracked.jsonl").read_text().splitlines())
    assert begun["after"] == 0 and begun["config"]["training"]["learning_rate"] == 0.01
    assert begun["config"]["subspace"]["method"] == "dora" and ended == {"closed": True}
    assert (picture["picture"], picture["at"]) == ("pictures/loss", STEPS) and picture["bytes"] > 5000
    expected = []
    for line in records(first.run):
        kind = "train" if "loss" in line else "eval"
        figures = {f"{kind}/{name.removeprefix('eval_')}": value for name, value in line.items() if name != "step"}
        expected.append({"step": line["step"], **figures})
    assert [sorted(line) for line in told] == [sorted(line) for line in expected]
    for line, figures in zip(told, expected, strict=True):
        assert line == pytest.approx(figures)


def test_a_run_that_goes_on_says_from_where_and_what_an_earlier_version_did_otherwise(
    folder: Path, first: Told
) -> None:
    state = json.loads((first.run / "checkpoint-4" / "trainer_state.json").read_text())
    rewritten(first.run / "checkpoint-4", "trainer_state.json", json.dumps(state | {"training": {}}).encode())
    config = configuration(folder)
    config["training"]["max_steps"] = 5
    told = run_of(config, after=4)
    assert "continuing after step 4, to step 5" in told.lines
    assert any(line.startswith("training.max_steps is 5, and was 4 when checkpoint-4 was made") for line in told.lines)
    assert any(line.startswith("checkpoint-4 is of an earlier version") for line in told.lines)
    assert (told.status[0]["state"], told.status[0]["step"]) == ("running", 4)
    tracked = [json.loads(line) for line in (first.run / "tracked.jsonl").read_text().splitlines()]
    assert [line["after"] for line in tracked if "after" in line] == [0, 4]


def test_what_a_method_has_no_use_for_is_said_and_so_is_what_to_lower_where_memory_is_short(
    folder: Path, tmp_path: Path
) -> None:
    """torch's own refusal of an allocation, in the first step."""

    def much(module: nn.Module, inputs: object) -> None:
        if isinstance(module, LlamaForCausalLM) and attachment(module) is not None and module.training:
            torch.empty(2**60, dtype=torch.uint8)

    config = configuration(folder)
    config["subspace"] = {"method": "ssl", "rank": 4, "dropout": 0.1}
    config["run"]["output_dir"] = str(tmp_path / "run")
    hook = register_module_forward_pre_hook(much)
    try:
        told = run_of(config, expect=EXIT_FAILED)
    finally:
        hook.remove()
    assert "method ssl has no rank or dropout: not used" in told.lines
    (said,) = (line.removeprefix("error: ") for line in told.lines if line.startswith("error: "))
    assert said.startswith("out of memory: training.per_device_train_batch_size=1 saves about ")
    assert "training.gradient_checkpointing=true saves about" in said and "Traceback" not in told.said
    status = read_status(tmp_path / "run") or {}
    assert (status["state"], status["rank"], status["message"]) == ("failed", 0, said)


def test_a_refusal_is_one_sentence_and_no_page_of_settings_before_it(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder)
    config["run"]["output_dir"], config["data"]["train"] = str(tmp_path / "run"), str(folder / "none.jsonl")
    told = run_of(config, expect=EXIT_USAGE)
    assert len(told.lines) == 2 and told.lines[0].startswith("1 process on "), told.said
    assert told.lines[1].startswith("error: data.train is ") and "none.jsonl" in told.lines[1]
