"""Keys of `training` that say how the learning rate goes, and for how many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments, get_scheduler

from dist_subspace.config import names
from tests.keys.bench import HELD_OUT, RECORDS, UNSET, Bench, Outcome
from tests.keys.reference import assert_follows, held_out_loss, train_plainly
from tests.keys.table import Key

# What each schedule cannot be without, or what makes it go another way than its default.
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 3.0, "lr_end": 1e-4},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 3},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 1, "threshold": 0.5},
    "cosine_with_min_lr": {"min_lr": 2e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 2, "min_lr_ratio": 0.1},
}
IN_A_RUN = ("linear", "cosine", "inverse_sqrt", "warmup_stable_decay")  # the others: tests/training/test_schedule.py


def _schedule(name: str, warmup: int, total: int) -> Callable[[Optimizer], Any]:
    return lambda optimizer: get_scheduler(
        name, optimizer, warmup, total, scheduler_specific_kwargs=dict(OPTIONS[name])
    )


def _follows(bench: Bench, changes: dict[str, Any], name: str, warmup: int, total: int) -> Outcome:
    given = {"training.lr_scheduler_type": name, "training.lr_scheduler_kwargs": OPTIONS[name]}
    outcome = bench.run(given | changes)
    expected = train_plainly(bench.peft_model(), outcome.trained_on, scheduler=_schedule(name, warmup, total))
    assert len(expected.rates) == total and len(set(expected.rates)) > 1
    assert_follows(outcome, expected)
    return outcome


def lr_scheduler_type(bench: Bench) -> None:
    assert OPTIONS.keys() == set(get_args(names.Scheduler))
    for name in IN_A_RUN:
        _follows(bench, {"training.warmup_steps": 1, "training.max_steps": 5}, name, warmup=1, total=5)


def lr_scheduler_kwargs(bench: Bench) -> None:
    _follows(bench, {}, "polynomial", warmup=0, total=6)
    _plateau(bench)


def _plateau(bench: Bench) -> None:
    """It is told the loss of every evaluation, that before the first step too."""
    changes = {
        "training.lr_scheduler_type": "reduce_lr_on_plateau",
        "training.lr_scheduler_kwargs": OPTIONS["reduce_lr_on_plateau"],
        "data.eval": bench.held_out,
        "run.eval_steps": 1,
    }
    outcome = bench.run(changes)
    rows = outcome.evaluated_on[:HELD_OUT]

    def told(step: int, model: nn.Module, schedule: Any) -> None:
        schedule.step(held_out_loss(model, rows))

    model = bench.peft_model()
    scheduler = _schedule("reduce_lr_on_plateau", 0, 6)
    expected = train_plainly(model, outcome.trained_on, scheduler=scheduler, after_step=told, before=True)
    assert len(set(expected.rates)) == 3
    assert_follows(outcome, expected)


def _warmup_of_transformers(steps: float, total: int) -> int:
    return int(TrainingArguments(output_dir="unused", warmup_steps=steps, report_to=[]).get_warmup_steps(total))


def warmup_steps(bench: Bench) -> None:
    for steps in (3, 0.4, 0.55):
        _follows(bench, {"training.warmup_steps": steps}, "linear", _warmup_of_transformers(steps, 6), total=6)
    assert _warmup_of_transformers(0.4, 6) == 3 and _warmup_of_transformers(0.55, 6) == 4  # 2.4 and 3.3, rounded up


def warmup_ratio(bench: Bench) -> None:
    changes = {"training.warmup_ratio": 0.4, "training.warmup_steps": UNSET}
    outcome = _follows(bench, changes, "linear", _warmup_of_transformers(0.4, 6), total=6)
    assert outcome.config["training"]["warmup_steps"] == 0.4


def max_steps(bench: Bench) -> None:
    for steps in (2, 7):
        _follows(bench, {"training.max_steps": steps}, "linear", warmup=0, total=steps)


def num_train_epochs(bench: Bench) -> None:
    """22 samples, four a step: an epoch is 5.5 steps. Whole epochs hold every sample once."""
    for epochs, steps in ((1, 6), (0.3, 2), (2, 11)):
        changes = {"training.num_train_epochs": epochs, "training.max_steps": UNSET}
        outcome = _follows(bench, changes, "linear", warmup=0, total=steps)
        epochs_behind = [4 * step / RECORDS for step in range(1, steps + 1)]
        assert [line["epoch"] for line in outcome.steps] == pytest.approx(epochs_behind)
        rows = outcome.trained_on
        for start in range(0, len(rows) - RECORDS + 1, RECORDS):
            assert sorted(rows[start : start + RECORDS]) == sorted(bench.samples)


KEYS = [
    Key("training.max_steps", (2, 7), "how many steps, and the schedule's length", "get_scheduler", max_steps),
    Key(
        "training.num_train_epochs",
        (1, 0.3, 2),
        "the same, as epochs: ceil(epochs x samples / global batch)",
        "get_scheduler; the definition; every sample once an epoch",
        num_train_epochs,
    ),
    Key("training.lr_scheduler_type", tuple(OPTIONS), "the rate of each step", "get_scheduler", lr_scheduler_type),
    Key(
        "training.lr_scheduler_kwargs",
        (OPTIONS["polynomial"], OPTIONS["reduce_lr_on_plateau"]),
        "the schedule's options; a plateau is told each evaluation",
        "get_scheduler, torch's ReduceLROnPlateau",
        lr_scheduler_kwargs,
    ),
    Key(
        "training.warmup_steps",
        (3, 0.4, 0.55),
        "steps of rising rate; a share is rounded up",
        "TrainingArguments.get_warmup_steps and get_scheduler",
        warmup_steps,
    ),
    Key("training.warmup_ratio", (0.4,), "the same as warmup_steps below 1", "as warmup_steps", warmup_ratio),
]
