"""Whole runs: one trajectory on any number of ranks, resumption, interruption, what is not finite, classification."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from dist_subspace import load_adapter, load_frozen
from dist_subspace.placement.engines import start_engine
from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, read_status
from dist_subspace.run_folder.trainer_state import read_trainer_state
from dist_subspace.subspace import methods
from dist_subspace.training.run import train
from tests.ranks import run_on_ranks, run_once_on_ranks
from tests.tiny_run import make_bert, make_model, make_records
from tests.whole_runs import configuration, losses, run_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_model(path / "model")
    make_records(path / "train.jsonl", 60)
    return path


def run_and_be_told_to_stop(config: dict[str, Any]) -> int:
    """Rank 0 gets a SIGTERM once the first step is logged; the other ranks learn of it from rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        _signal_when_there(Path(config["run"]["output_dir"]) / "metrics.jsonl")
    return train(config)


def _signal_when_there(file: Path) -> None:
    import threading

    def watch() -> None:
        while not file.exists() or not file.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def test_one_trajectory_on_one_two_and_three_ranks_packed_or_not_with_dropout(folder: Path, tmp_path: Path) -> None:
    for packing in (False, True):
        curves = []
        for ranks in (1, 2, 3):
            run = tmp_path / f"{packing}-{ranks}"
            config = configuration(folder, run)
            config["data"] |= {"packing": packing, "max_length": 64}
            config["training"] |= {"global_batch_size": 6 if packing else 10}
            assert run_on_ranks(ranks, run_here, config) == [EXIT_OK] * ranks
            curves.append(losses(run))
        assert len(curves[0]) == 6
        for curve in curves[1:]:
            assert curve == pytest.approx(curves[0], rel=1e-5)


# What a checkpoint of each kind holds: pairs, vectors, virtual tokens, biases, frozen factors, a schedule, a decomposition.
KINDS = [
    "lora",
    "dora",
    "pissa",
    "vera",
    "ssb",
    "bitfit",
    "prefix",
    "houlsby",
    "lora-xs",
    "adalora",
    "lora-dash",
    "oft",
]


@pytest.mark.parametrize(
    ("method", "preset"),
    [
        pytest.param(method, preset, marks=[] if (method in KINDS and preset == "zero3") else [pytest.mark.slow])
        for method in sorted(methods())
        for preset in ("zero0", "zero3")
    ],
)
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(
    method: str, preset: str, folder: Path, tmp_path: Path
) -> None:
    """A micro-batch a step and rank; of the rounds of a step, uneven ones too, the loss scaler's test below has eight."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = configuration(folder, whole, max_steps=4, global_batch_size=4) | {
        "deepspeed": {"preset": preset},
        "checkpoint": {"save_steps": 2},
    }
    config["subspace"] = {"method": method, "dropout": 0.1}
    config["model"]["storage"] = "nf4"
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    shutil.copytree(whole, parts)  # as it was when it was killed in the last step
    shutil.rmtree(parts / "checkpoint-4")
    config["run"]["output_dir"] = str(parts)
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = load_file(whole / "checkpoint-4" / name), load_file(parts / "checkpoint-4" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def run_with_a_loss_scaler(config: dict[str, Any]) -> int:
    """DeepSpeed has no fp16 engine on CPUs; its dynamic scaler counts and scales in a float32 engine as it does there."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from dist_subspace.training import trainer

    def started(*args: Any) -> Any:
        engine = start_engine(*args)
        engine.deepspeed.optimizer.loss_scaler = DynamicLossScaler(2.0**8, 3, 1.0, 2, False)
        engine.deepspeed.optimizer.dynamic_loss_scale = True
        return engine

    trainer.start_engine = started
    try:
        return train(config)
    finally:
        trainer.start_engine = start_engine


@pytest.mark.parametrize("preset", ["zero2", "zero3"])
def test_a_resumed_run_goes_on_with_the_loss_scale_where_it_stood(preset: str, folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = configuration(folder, whole, max_steps=8) | {
        "deepspeed": {"preset": preset},
        "checkpoint": {"save_steps": 5},
    }
    assert run_on_ranks(2, run_with_a_loss_scaler, config) == [EXIT_OK] * 2
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-8")
    config["run"]["output_dir"] = str(parts)
    assert run_on_ranks(2, run_with_a_loss_scaler, config) == [EXIT_OK] * 2
    stored = [json.loads((run / "checkpoint-8" / "trainer_state.json").read_text()) for run in (whole, parts)]
    assert stored[0]["loss_scaler"] == stored[1]["loss_scaler"]
    assert stored[0]["loss_scaler"]["cur_iter"] == 8 and stored[0]["loss_scaler"]["cur_scale"] > 2.0**8
    assert losses(parts) == losses(whole)


def test_a_checkpoint_from_before_the_loss_scale_was_kept_is_read(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = configuration(folder, run, max_steps=3)
    assert run_here(config) == EXIT_OK
    file = run / "checkpoint-3" / "trainer_state.json"
    stored = json.loads(file.read_text())
    assert stored.pop("loss_scaler") == {}
    file.write_text(json.dumps(stored))
    assert read_trainer_state(run / "checkpoint-3").loss_scaler == {}


def test_a_signal_on_one_rank_stops_all_saves_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path / "run", max_steps=400)
    assert run_on_ranks(2, run_and_be_told_to_stop, config) == [EXIT_INTERRUPTED] * 2
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status["state"] == "interrupted"
    stopped = status["step"]
    assert 0 < stopped < 400
    assert (tmp_path / "run" / f"checkpoint-{stopped}" / "MANIFEST.json").exists()
    config["training"]["max_steps"] = stopped + 2
    assert run_on_ranks(2, run_here, config, ["checkpoint.allow_different=[method]"]) == [EXIT_OK] * 2
    assert len(losses(tmp_path / "run")) == stopped + 2


def test_time_that_is_over_interrupts_and_saves(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path / "run", max_steps=100_000, max_time=1)
    assert run_here(config) == EXIT_INTERRUPTED
    assert "max_time" in read_status(tmp_path / "run")["message"]  # type: ignore[index]


@pytest.mark.parametrize("preset", ["zero0", "zero3"])
def test_steps_that_are_not_finite_are_skipped_or_stop_the_run(preset: str, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    make_model(broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][:] = float("inf")
    from safetensors.torch import save_file

    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = configuration(folder, tmp_path / "skip", max_steps=2) | {"deepspeed": {"preset": preset}}
    config["model"]["path"] = str(broken)
    assert run_on_ranks(2, run_here, config) == [EXIT_FAILED] * 2
    assert "2 of 2 steps were skipped" in read_status(tmp_path / "skip")["message"]  # type: ignore[index]
    adapter = load_file(tmp_path / "skip" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert all(not tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # nothing was applied
    config["run"]["output_dir"] = str(tmp_path / "stop")
    config["training"]["on_nonfinite"] = "stop"
    assert run_on_ranks(2, run_here, config) == [EXIT_FAILED] * 2
    message = (read_status(tmp_path / "stop") or {})["message"]
    assert message.startswith("step 1 has loss nan, and training.on_nonfinite is stop"), (
        "a sentence, and no exception's name"
    )


def test_a_failure_on_rank_0_is_said_by_rank_0_alone(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".checkpoint-3.partial").write_text("a file where the hidden folder shall be")  # root may write anywhere
    first, second = run_once_on_ranks(2, run_here, configuration(folder, run))
    assert [first.result, second.result] == [EXIT_FAILED] * 2
    assert first.output.count("error: ") == 1 and "checkpoint-3 could not be written (File exists;" in first.output
    assert not any(word in second.output for word in ("error: ", "Traceback", "PeerFailed"))
    status = read_status(run)
    assert status is not None
    assert (status["state"], status["rank"]) == ("failed", 0) and "checkpoint-3" in status["message"]


def test_the_adapter_appears_with_its_tokenizer_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = tmp_path / "run"
    config = configuration(folder, run, max_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        assert run_here(config) == EXIT_FAILED
    assert "adapter could not be written (No space left" in read_status(run)["message"]  # type: ignore[index]
    assert not (run / "adapter").exists() and not (run / ".adapter.partial").exists()
    assert run_here(config) == EXIT_OK
    assert (run / "adapter" / "tokenizer.json").exists()
    (run / "adapter" / "stale").write_text("of the run's earlier end")
    config["training"]["max_steps"] = 2
    assert run_here(config) == EXIT_OK
    assert (run / "adapter" / "tokenizer.json").exists() and not (run / "adapter" / "stale").exists()
    assert not [path for path in run.iterdir() if path.name.startswith(".adapter")]


def test_the_best_checkpoint_is_kept_and_becomes_the_adapter(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path / "run", max_steps=8)
    config["data"]["eval"] = 0.2
    config["run"]["eval_steps"] = 1
    config["checkpoint"] = {"save_steps": 1, "save_total_limit": 2, "metric_for_best_model": "loss"}
    config["checkpoint"]["greater_is_better"] = True  # turned round, so that training makes it worse
    assert run_here(config) == EXIT_OK
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"] > 0}
    best = max(evaluated, key=lambda step: evaluated[step])
    assert best < 8
    kept = load_file(run / f"checkpoint-{best}" / "adapter_model.safetensors")
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], kept[name]) for name in kept)


def test_a_checkpoint_of_another_run_goes_on_here_with_a_best_of_its_own(folder: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    config = configuration(folder, first, max_steps=4)
    config["data"]["eval"] = 0.2
    config["run"]["eval_steps"] = 1
    config["checkpoint"] = {"save_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    before = read_trainer_state(first / "checkpoint-3").best
    assert before is not None and before["step"] == 1  # turned round, so that it is not beaten later
    config["checkpoint"]["resume"] = str(first / "checkpoint-3")
    config["run"]["output_dir"] = str(second)
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    assert same_adapter(second / "adapter", second / "checkpoint-4")
    config["checkpoint"]["resume"] = str(first / "checkpoint-4")  # where no step is left to make
    config["run"]["output_dir"] = str(third)
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    assert same_adapter(third / "adapter", first / "checkpoint-4")


def same_adapter(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("preset", "ranks", "kind", "fresh"),
    [
        ("zero2", 1, BertForSequenceClassification, ["classifier"]),
        ("zero3", 2, BertForMaskedLM, ["classifier", "bert.pooler.dense"]),
    ],
)
def test_classification_trains_in_full_and_saves_what_the_base_lacks(
    preset: str, ranks: int, kind: Any, fresh: list[str], tmp_path: Path
) -> None:
    make_bert(tmp_path / "model", kind)
    rows = [{"text": f"{'good' if n % 2 else 'bad'} {n % 5}", "label": "yes" if n % 2 else "no"} for n in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    values = configuration(tmp_path, run, max_steps=40)
    values["model"] |= {"task": "classification", "storage": "nf4"}
    values["subspace"] = {"method": "lora", "rank": 4}
    values["data"] = {"train": str(tmp_path / "train.jsonl"), "format": "classification", "eval": 0.2, "max_length": 32}
    values["deepspeed"] = {"preset": preset}
    values["training"]["seed"] = 3
    values["checkpoint"]["save_steps"] = 40
    assert run_on_ranks(ranks, run_here, values) == [EXIT_OK] * ranks
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_accuracy"] > 0.9
    assert lines[-1]["eval_f1"] > 0.9
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    head = adapter["base_model.model.classifier.weight"]
    assert head.shape == (2, 32)
    assert head.dtype == torch.float32
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == fresh
    bases = [load_frozen(tmp_path / "model", storage="nf4", task="classification", seed=seed) for seed in (0, 1)]
    first, second = (load_adapter(base, run / "adapter")(input_ids=torch.arange(4, 12)[None]).logits for base in bases)
    assert torch.equal(first, second), "something is drawn anew wherever it is loaded"
