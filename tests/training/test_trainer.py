"""What a run is at each of its moments: continued, it is the run that was never interrupted; measured, it is left as it was."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForCausalLM,
)

from dist_subspace.run_folder.status import EXIT_OK, read_status
from dist_subspace.subspace import attachment
from tests.ranks import run_on_ranks
from tests.tiny_run import make_bert, make_model, make_records, make_tokenizer
from tests.training.macro_f1 import macro_f1
from tests.whole_runs import assert_same, records, rewritten, run_here, scalars

STEPS, MIDDLE = 9, 4
BATCH = 10
ELSEWHERE = 1000.0  # seconds that the run has spent before it is continued


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with dropout of its own that computes no number for one record: its letter Z has no embedding."""
    path = tmp_path_factory.mktemp("runs")
    make_model(path / "model")
    config = json.loads((path / "model" / "config.json").read_text())
    (path / "model" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    weights = load_file(path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][make_tokenizer().convert_tokens_to_ids("Z")] = float("nan")
    save_file(weights, path / "model" / "model.safetensors", metadata={"format": "pt"})
    make_records(path / "train.jsonl", 29)
    with (path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "Z", "output": "no number"}) + "\n")
    make_records(path / "eval.jsonl", 5)
    return path


def configuration(folder: Path, run: Path, **training: Any) -> dict[str, Any]:
    """Three steps an epoch; in one of them a loss is no number."""
    given = {"max_steps": STEPS, "global_batch_size": BATCH, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32"},
        "subspace": {"method": "lora", "rank": 4, "dropout": 0.3, "modules_to_save": ["lm_head"]},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": 96,
            "packing": False,
            "cache_dir": str(folder / "tokens"),
        },
        "training": given | {"per_device_eval_batch_size": 1, "gradient_checkpointing": False} | training,
        "deepspeed": {"preset": "zero0"},
        "checkpoint": {"save_steps": 1, "save_total_limit": STEPS, "metric_for_best_model": "loss"},
        "run": {"output_dir": str(run), "logging_steps": 1, "eval_steps": 1, "report_to": "none"},
    }


def without_the_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "peak_memory_bytes", "elapsed_seconds")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoint-*")}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a run remembers is in it: a plateau schedule that lowers its rate at every second evaluation, a best that
    is early (the metric is turned round), steps that are skipped, a module trained in full."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(plateau(folder, run)) == EXIT_OK
    return run


def plateau(folder: Path, run: Path) -> dict[str, Any]:
    config = configuration(folder, run, lr_scheduler_type="reduce_lr_on_plateau")
    config["training"]["lr_scheduler_kwargs"] = {"mode": "max", "patience": 1, "factor": 0.5}
    config["checkpoint"]["greater_is_better"] = True
    config["run"]["report_to"] = ["tensorboard"]
    return config


def killed_after(step: int, whole: Path, run: Path) -> Path:
    """The folder as it was when the process died before its next checkpoint; it had spent a long time before."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    for name in checkpoints(run):
        if int(name.rpartition("-")[2]) > step:
            shutil.rmtree(run / name)
    told = state(run, step) | {"elapsed_seconds": ELSEWHERE}
    rewritten(run / f"checkpoint-{step}", "trainer_state.json", json.dumps(told).encode())
    return run


@pytest.fixture(scope="module")
def continued(folder: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = killed_after(MIDDLE, whole, tmp_path_factory.mktemp("continued") / "run")
    assert run_here(plateau(folder, run)) == EXIT_OK
    return run


def test_a_continued_run_has_every_line_of_the_one_that_was_not_interrupted(whole: Path, continued: Path) -> None:
    expected = without_the_clock(records(whole))
    assert without_the_clock(records(continued)) == expected
    assert [line["step"] for line in expected if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in expected if "eval_loss" in line] == list(range(STEPS + 1))


def test_a_continued_run_ends_in_the_state_of_the_one_that_was_not_interrupted(whole: Path, continued: Path) -> None:
    one, other = state(whole, STEPS), state(continued, STEPS)
    assert one.pop("elapsed_seconds") < ELSEWHERE < other.pop("elapsed_seconds")
    assert other == one
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert_same(continued / f"checkpoint-{STEPS}" / name, whole / f"checkpoint-{STEPS}" / name)


def test_time_samples_and_tokens_go_on_from_where_the_run_was_left(folder: Path, continued: Path) -> None:
    lines = [line for line in records(continued) if "loss" in line]
    assert all(line["elapsed_seconds"] > ELSEWHERE for line in lines[MIDDLE:])
    assert [line["samples"] for line in lines] == [BATCH * step for step in range(1, STEPS + 1)]
    rows = [json.loads(row) for row in (folder / "train.jsonl").read_text().splitlines()]
    texts = [f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}" for row in rows]
    epoch = sum(len(text.encode()) + 1 for text in texts)  # a byte is a token, and so is the end
    assert [lines[step - 1]["tokens"] for step in (3, 6, 9)] == [epoch, 2 * epoch, 3 * epoch]
    assert [lines[step - 1]["epoch"] for step in (3, 6, 9)] == [1.0, 2.0, 3.0]
    stored = state(continued, STEPS)
    assert (stored["samples"], stored["tokens"]) == (BATCH * STEPS, 3 * epoch)


def test_skipped_steps_from_before_and_after_the_resume_are_one_sum(continued: Path) -> None:
    lost = [line["step"] for line in records(continued) if "loss" in line and line["loss"] is None]
    assert len(lost) == 3 and min(lost) <= MIDDLE < max(lost)  # one in each epoch
    stored, status = state(continued, STEPS), read_status(continued) or {}
    assert (stored["skipped"], stored["overflowed"], stored["step"]) == (3, 0, STEPS)
    assert stored["optimizer_steps"] == STEPS - 3
    assert (status["state"], status["step"], status["skipped"]) == ("finished", STEPS, 3)
    assert f"3 of {STEPS} steps were skipped" in status["warning"]


def test_the_best_from_before_the_resume_is_the_adapter(continued: Path) -> None:
    measured = {line["step"]: line["eval_loss"] for line in records(continued) if "eval_loss" in line and line["step"]}
    best = max(measured, key=lambda step: measured[step])
    assert best <= MIDDLE
    assert state(continued, STEPS)["best"] == {"metric": "eval_loss", "value": measured[best], "step": best}
    assert_same(
        continued / "adapter" / "adapter_model.safetensors",
        continued / f"checkpoint-{best}" / "adapter_model.safetensors",
    )


def test_a_best_whose_folder_is_gone_is_chosen_anew_and_that_is_said(
    folder: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = killed_after(STEPS - 1, whole, tmp_path / "run")
    lost = state(run, STEPS - 1)["best"]["step"]
    shutil.rmtree(run / f"checkpoint-{lost}")
    assert run_here(plateau(folder, run)) == EXIT_OK
    assert f"the best so far, checkpoint-{lost}, is not in" in capfd.readouterr().out
    assert state(run, STEPS)["best"]["step"] == STEPS


@pytest.mark.parametrize(("rate", "warmup"), [(1e30, 2), (1e-30, 0)])
def test_a_model_that_gives_no_number_and_one_that_is_no_better_do_not_replace_the_best(
    rate: float, warmup: int, folder: Path, tmp_path: Path
) -> None:
    """The first step has rate 0, and the second ruins the model; or no step changes anything."""
    config = configuration(folder, tmp_path / "run", max_steps=3, learning_rate=rate, warmup_steps=warmup)
    config["training"] |= {"lr_scheduler_type": "constant_with_warmup", "max_grad_norm": 0.0}
    make_records(tmp_path / "train.jsonl", 20)
    config["data"]["train"] = str(tmp_path / "train.jsonl")
    assert run_here(config) == EXIT_OK
    assert (evaluations(tmp_path / "run")[3] is None) == (rate > 1)
    assert (state(tmp_path / "run", 3)["best"] or {})["step"] == 1


def test_a_run_whose_evaluations_give_no_number_has_no_best_and_goes_on(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path / "run", max_steps=1, lr_scheduler_type="reduce_lr_on_plateau")
    config["data"]["eval"] = str(folder / "train.jsonl")  # which has the record that the base computes no number for
    assert run_here(config) == EXIT_OK
    config["training"]["max_steps"] = 2
    assert run_here(config) == EXIT_OK, read_status(tmp_path / "run")
    assert state(tmp_path / "run", 2)["best"] is None and set(evaluations(tmp_path / "run").values()) == {None}


def test_the_rate_of_each_step_is_that_of_torchs_plateau_schedule_on_the_logged_losses(continued: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=1, factor=0.5)
    for line in records(continued):
        if "eval_loss" in line:
            schedule.step(line["eval_loss"])
        else:
            assert line["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups[0]["lr"] < 0.01 / 4


def test_a_tracker_shows_each_step_of_a_continued_run_once(continued: Path) -> None:
    figures = scalars(continued)
    lost = [line["step"] for line in records(continued) if "loss" in line and line["loss"] is None]
    assert [step for step, _ in figures["train/loss"]] == [n for n in range(1, STEPS + 1) if n not in lost]
    assert [step for step, _ in figures["eval/loss"]] == list(range(STEPS + 1))


def test_a_run_goes_on_alike_on_another_number_of_ranks_and_at_another_stage(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    run = killed_after(MIDDLE, whole, tmp_path / "run")
    config = plateau(folder, run) | {"deepspeed": {"preset": "zero3"}}
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    figures = ("loss", "eval_loss", "grad_norm", "learning_rate", "samples", "tokens")
    for found, expected in zip(records(run), records(whole), strict=True):
        lost = {name for name in figures if expected.get(name) is None}
        assert lost == {name for name in figures if found.get(name) is None}
        same = {name: expected[name] for name in figures if name not in lost}
        assert {name: found[name] for name in same} == pytest.approx(same, rel=1e-4)
    one, other = (load_file(path / f"checkpoint-{STEPS}" / "optimizer.safetensors") for path in (run, whole))
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def of_plain_transformers(folder: Path, checkpoint: Path | None) -> float:
    """The mean loss over all targets of the evaluation's records, one at a time, of transformers' model with PEFT's adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    if checkpoint is not None:
        model = peft.PeftModel.from_pretrained(model, checkpoint)
    model.eval()
    tokenizer, total, targets = make_tokenizer(), 0.0, 0
    for row in map(json.loads, (folder / "eval.jsonl").read_text().splitlines()):
        prompt = tokenizer(f"### Instruction:\n{row['instruction']}\n\n### Response:\n")["input_ids"]
        answer = tokenizer(row["output"] + "</s>")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        targets += len(answer)
    return total / targets


def evaluations(run: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in records(run) if "eval_loss" in line}


def test_the_held_out_loss_is_that_of_transformers_and_peft(folder: Path, whole: Path) -> None:
    for step in (0, MIDDLE, STEPS):
        expected = of_plain_transformers(folder, whole / f"checkpoint-{step}" if step else None)
        assert evaluations(whole)[step] == pytest.approx(expected, rel=1e-5)
    assert evaluations(whole)[STEPS] < evaluations(whole)[0]


@pytest.mark.parametrize(("ranks", "preset"), [(2, "zero2"), (3, "zero3")])
def test_ranks_that_idle_in_an_evaluation_count_nothing(ranks: int, preset: str, folder: Path, tmp_path: Path) -> None:
    """Five samples: on two ranks the third round has one, on three the second has two."""
    config = configuration(folder, tmp_path / "run", max_steps=1, warmup_steps=0) | {"deepspeed": {"preset": preset}}
    assert run_on_ranks(ranks, run_here, config) == [EXIT_OK] * ranks
    expected = {
        step: of_plain_transformers(folder, path) for step, path in ((0, None), (1, tmp_path / "run" / "adapter"))
    }
    assert evaluations(tmp_path / "run") == pytest.approx(expected, rel=1e-5) and expected[0] != expected[1]


@pytest.fixture
def forwards() -> Iterator[list[tuple[set[bool], bool]]]:
    """Of each forward of a model with a method: the modes of all its modules, and whether gradients are recorded."""
    seen: list[tuple[set[bool], bool]] = []

    def look(module: nn.Module, inputs: object) -> None:
        if isinstance(module, LlamaForCausalLM) and attachment(module) is not None:
            seen.append(({part.training for part in module.modules()}, torch.is_grad_enabled()))

    hook = register_module_forward_pre_hook(look)
    yield seen
    hook.remove()


TRAINS, MEASURES = ({True}, True), ({False}, False)


def test_an_evaluation_leaves_no_trace_in_the_training(
    folder: Path, tmp_path: Path, forwards: list[tuple[set[bool], bool]]
) -> None:
    found = []
    for evaluates in (True, False):
        run = tmp_path / str(evaluates)
        config = configuration(folder, run, max_steps=3, warmup_steps=0)
        if (
            evaluates
        ):  # the metric is turned round, so that the first is the best: it is saved though no checkpoint is due
            best = {"metric_for_best_model": "loss", "greater_is_better": True}
            config["checkpoint"] = {"save_steps": 2, "save_total_limit": 2} | best
        else:
            config["checkpoint"] = {"save_steps": 1, "save_total_limit": 2}
            config["data"]["eval"] = None
        forwards.clear()
        assert run_here(config) == EXIT_OK
        step = [TRAINS] * (BATCH // 2)
        measured = [MEASURES] * 5
        expected = (
            measured + (step + measured) * 3 if evaluates else step * 3 + [MEASURES]
        )  # the last one is the run's end
        found_out = [MEASURES]  # how the loss is made
        assert forwards == found_out + expected, (
            "a model trains with dropout, and is measured without it and without gradients"
        )
        found.append([line for line in without_the_clock(records(run)) if "loss" in line])
    assert found[0] == found[1]
    rates = [0.005 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]  # a skipped step counts as one
    assert [line["learning_rate"] for line in found[0]] == pytest.approx(rates)
    assert [line["loss"] for line in found[0]].count(None) == 1
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert_same(tmp_path / "True" / "checkpoint-3" / name, tmp_path / "False" / "checkpoint-3" / name)
    assert checkpoints(tmp_path / "True") == {"checkpoint-1", "checkpoint-3"}  # the best, and the newest
    assert checkpoints(tmp_path / "False") == {"checkpoint-2", "checkpoint-3"}


TRAINED = "bert.encoder.layer.1.output.dense"


def test_modules_trained_beside_a_new_head_are_saved_with_it_and_the_metrics_are_those_of_transformers(
    tmp_path: Path,
) -> None:
    make_bert(tmp_path / "model", BertForSequenceClassification)
    rows = [{"text": "abc"[: 1 + n % 3] * (1 + n % 4), "label": ("no", "so", "yes")[n % 3]} for n in range(12)]
    for name, part in (("train", rows), ("eval", [*rows[:6], rows[0]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    run = tmp_path / "run"
    config = configuration(tmp_path, run, max_steps=3, global_batch_size=6, learning_rate=0.1, warmup_steps=0)
    config["model"]["task"] = "classification"
    config["subspace"]["modules_to_save"] = ["encoder.layer.1.output.dense"]
    config["data"] |= {"format": "classification", "max_length": 32}
    config["checkpoint"] = {"save_steps": 10, "metric_for_best_model": "loss"}
    config["run"] |= {"eval_steps": 2, "logging_steps": 2}
    assert run_here(config) == EXIT_OK
    listed = json.loads((run / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    assert set(listed) == {TRAINED, "classifier"}
    adapter, base = (
        load_file(run / "adapter" / "adapter_model.safetensors"),
        load_file(tmp_path / "model" / "model.safetensors"),
    )
    (kept,) = (tensor for name, tensor in adapter.items() if name.endswith(f"{TRAINED}.weight"))
    assert not torch.equal(kept, base[f"{TRAINED.removeprefix('bert.')}.weight"])
    assert sorted(evaluations(run)) == [0, 2, 3]  # those that are due, and the last
    best = min((2, 3), key=lambda step: evaluations(run)[step])
    assert checkpoints(run) == {"checkpoint-3", "checkpoint-2"}
    (measured,) = (line for line in records(run) if line["step"] == best and "eval_loss" in line)
    expected = of_a_plain_classifier(tmp_path, run / "adapter")
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def of_a_plain_classifier(folder: Path, adapter: Path) -> dict[str, float]:
    """Loss, accuracy and macro F1 by their definitions, of transformers' model with PEFT's adapter, one sample at a time."""
    names = json.loads((adapter / "labels.json").read_text())
    base: Any = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=len(names))
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    tokenizer, loss, true, guessed = make_tokenizer(), 0.0, [], []
    for row in map(json.loads, (folder / "eval.jsonl").read_text().splitlines()):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        true.append(names.index(row["label"]))
        guessed.append(int(logits.argmax()))
        loss += float(functional.cross_entropy(logits, torch.tensor(true[-1:])))
    hits = sum(a == b for a, b in zip(true, guessed, strict=True))
    return {"eval_loss": loss / len(true), "eval_accuracy": hits / len(true), "eval_f1": macro_f1(true, guessed)}
