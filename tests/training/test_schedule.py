"""The learning rate is a function of the step and the configuration, and it is Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

from dist_subspace.config import names
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE
from dist_subspace.training.schedule import PLATEAU, Schedule, warmup_count, warmup_warning
from tests.ranks import run_on_ranks
from tests.whole_runs import configuration, run_here

STEPS = 40
OPTIONS: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-5},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 9, "min_lr_ratio": 0.1},
}


def of_transformers(
    name: str, rates: list[float], warmup: int, total: int, options: dict[str, Any]
) -> list[list[float]]:
    """The rates before each step, as a loop of Hugging Face's kind has them."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": r} for r in rates], lr=rates[0])
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=options)
    found = []
    for _ in range(total):
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", [name for name in get_args(names.Scheduler) if name != PLATEAU])
@pytest.mark.parametrize("warmup", [0, 5, 0.13, STEPS + 3])
def test_it_is_transformers_own_stepped_or_put_at_any_step(name: str, warmup: float) -> None:
    rates, options = [0.01, 0.16], OPTIONS.get(name, {})
    expected = of_transformers(name, rates, warmup_count(warmup, STEPS), STEPS, options)
    stepped, placed = (Schedule(name, rates, warmup, STEPS, options) for _ in range(2))
    for step in range(STEPS):
        assert stepped.rates == expected[step]
        stepped.advance()
    for step in (7, STEPS - 1, 0, 23):
        placed.restore(
            {"rates": [9.0, 9.0], "scheduler": {"last_epoch": 3, "base_lrs": [9.0, 9.0]}}, step
        )  # of another
        assert placed.rates == expected[step]


def test_a_plateau_keeps_what_it_has_learned_and_takes_its_rate_and_options_from_the_configuration() -> None:
    rates, options = [0.01, 0.16], {"patience": 0, "factor": 0.5}
    first, same = (Schedule(PLATEAU, rates, 0, STEPS, options) for _ in range(2))
    for loss in (1.0, 2.0, 3.0):
        first.evaluated(loss)
    assert first.rates == [0.0025, 0.04]
    same.restore(json.loads(json.dumps(first.state())), 5)
    for schedule in (first, same):
        schedule.evaluated(4.0)
    assert same.rates == first.rates == [0.00125, 0.02]
    other = Schedule(PLATEAU, [0.1, 1.6], 0, STEPS, {"patience": 0, "factor": 0.1})
    other.restore(first.state(), 5)
    assert other.rates == pytest.approx([0.0125, 0.2])
    other.evaluated(5.0)
    assert other.rates == pytest.approx([0.00125, 0.02])


def test_a_plateau_of_an_older_checkpoint_is_read() -> None:
    stored = {
        "rates": [0.005],
        "scheduler": {"factor": 0.5, "best": 1.0, "num_bad_epochs": 1, "cooldown_counter": 0, "last_epoch": 2},
    }
    schedule = Schedule(PLATEAU, [0.01], 0, STEPS, {"patience": 1, "factor": 0.1})
    schedule.restore(stored, 2)
    assert schedule.rates == [0.005]
    schedule.evaluated(2.0)
    assert schedule.rates == pytest.approx([0.0005])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cosine", {"cycles": 3}, "cycles"),
        ("polynomial", {"lr_end": 1.0}, "lr_end"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("constant", {"num_cycles": 2}, "has no options"),
        ("constant_with_warmup", {"num_cycles": 2}, "has no options"),
    ],
)
def test_options_that_a_schedule_does_not_take_or_lacks_are_named(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=rf"training.lr_scheduler_kwargs is .*'{name}'.*{words}"):
        Schedule(name, [0.01], 0, STEPS, options)


@pytest.mark.parametrize(
    ("name", "warmup", "done", "total", "words"),
    [
        (
            "cosine",
            0.03,
            0,
            1,
            "training.warmup_steps is 0.03, which is 1 of 1 steps: the learning rate of every step is 0",
        ),
        ("linear", 7, 0, 1, "training.warmup_steps is 7 of 1 steps: the learning rate of every step is 0"),
        ("linear", 50, 0, 20, "ends in its warm-up, with a learning rate of at most 0.0038"),
        ("constant_with_warmup", 20, 5, 20, "ends in its warm-up"),
        ("linear", 0, 0, 1, None),
        ("cosine", 0.03, 0, 2, None),
        ("cosine", 0.5, 3, 20, None),
        ("constant", 5, 0, 1, None),
        ("linear", 1, 1, 1, None),
    ],
)
def test_a_warm_up_that_the_run_never_leaves_is_said(
    name: str, warmup: float, done: int, total: int, words: str | None
) -> None:
    said = warmup_warning(Schedule(name, [0.01], warmup, total, {}), warmup, done, total)
    assert words in str(said) if words else said is None


def rates(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "loss" in line]


@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_goes_on_with_other_settings_follows_them_and_says_what_changed(
    old: bool, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    before = {"warmup_steps": 0, "lr_scheduler_type": "linear", "learning_rate": 1e-3, "global_batch_size": 4}
    config = configuration(folder, run, max_steps=5, **before)
    config["run"]["logging_steps"] = 1
    assert run_here(config) == EXIT_OK
    if old:  # as checkpoints were before they held the settings: they are read in config.yaml beside them
        file = run / "checkpoint-5" / "trainer_state.json"
        stored = json.loads(file.read_text())
        del stored["training"], stored["overflowed"]
        file.write_text(json.dumps(stored))
        manifest = run / "checkpoint-5" / "MANIFEST.json"
        listed = json.loads(manifest.read_text())
        import hashlib

        listed[file.name] = {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        manifest.write_text(json.dumps(listed))
    config["training"] |= {"max_steps": 10, "learning_rate": 2e-3, "weight_decay": 0.1, "adam_beta2": 0.99}
    capfd.readouterr()
    assert run_here(config) == EXIT_OK
    expected = of_transformers("linear", [1e-3], 0, 5, {}) + of_transformers("linear", [2e-3], 0, 10, {})[5:]
    assert rates(run) == [rate for (rate,) in expected]
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("training.")]
    assert len(said) == 4
    assert "training.learning_rate is 0.002, and was 0.001 when checkpoint-5 was made" in "\n".join(said)
    config["training"]["max_steps"] = 11
    assert run_here(config) == EXIT_OK
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("training.")]
    assert len(said) == 1 and said[0].startswith("training.max_steps is 11, and was 10")


def test_another_optimizer_begins_with_moments_and_counters_of_its_own(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = configuration(folder, run, max_steps=3, optim="adagrad", global_batch_size=4)
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    config["training"] |= {"max_steps": 5, "optim": "adamw_torch"}
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    assert json.loads((run / "checkpoint-5" / "trainer_state.json").read_text())["optimizer_steps"] == 2


def test_schedule_options_are_refused_before_the_model_is_read(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configuration(folder, tmp_path / "run", lr_scheduler_kwargs={"cycles": 3})
    assert run_here(config) == EXIT_USAGE
    said = capfd.readouterr()
    assert "training.lr_scheduler_kwargs is {'cycles': 3}" in said.err and "reading the model" not in said.out
