"""A search trains what the run would train, and has nothing of the run's own: no folder, no tracker, no limit of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.placement.engines import without_training_sections
from dist_subspace.rate_search.room import search_config
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.training.engine_config import with_stock_choices
from tests.rate_search.searches import configuration, plan_of

# Keys of a run that a search has otherwise; every other one is the run's.
CHANGED = {
    "training": {"lr_scheduler_type", "lr_scheduler_kwargs", "on_nonfinite", "early_stopping_patience", "max_time"},
    "checkpoint": {"resume", "metric_for_best_model", "allow_different"},
    "run": {"output_dir", "report_to", "sample_prompts", "push_to_hub", "profile"},
}
OWN: dict[str, Any] = {
    "training": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "max_time": 60,
    },
    "checkpoint": {"resume": "auto", "metric_for_best_model": "loss"},
    "run": {"report_to": ["tensorboard"], "sample_prompts": ["a"], "push_to_hub": "a/b", "profile": 3},
}


def test_all_that_decides_what_is_trained_on_what_is_the_runs(home: Path) -> None:
    given = configuration(home, "run")
    config = load_config(
        {name: {**section, **OWN.get(name, {})} for name, section in given.items()} | {"checkpoint": OWN["checkpoint"]}
    )
    changed = search_config(config, RunFolder(home / "search"))
    for name, before in config.model_dump().items():
        after = changed.model_dump()[name]
        assert {key for key in before if before[key] != after[key]} <= CHANGED.get(name, set()), name
    assert changed.run.report_to == () and changed.run.push_to_hub is None and changed.training.max_time is None
    assert changed.training.lr_scheduler_type == "constant_with_warmup" and changed.checkpoint.resume == "none"


def test_without_held_out_data_nothing_can_be_compared(home: Path) -> None:
    given = configuration(home, "run")
    given["data"]["eval"] = None
    with pytest.raises(
        UsageError, match=r"data.eval is null, .*; accepted: a file, or a fraction .*, such as data.eval=0.05"
    ):
        search_config(load_config(given), RunFolder(home / "search"))


def test_a_stock_json_keeps_all_but_its_rate_and_its_schedule(home: Path) -> None:
    stock = {
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 6}},
        "zero_optimization": {"stage": 2},
    }
    given = configuration(home, "run")
    given["deepspeed"] = {"config": stock}
    config = search_config(with_stock_choices(load_config(given)), RunFolder(home / "search"))
    assert config.training.optim == "sgd"
    assert config.deepspeed.config == without_training_sections(stock) == {"zero_optimization": {"stage": 2}}


def test_a_plan_is_no_longer_than_the_run_and_looks_at_the_samples_that_were_asked_for(home: Path) -> None:
    given = configuration(home, "run")
    whole = plan_of(given, home / "search", steps=None)
    assert (whole.total_steps, len(whole.data.eval or ())) == (6, 7)
    short = plan_of(given, home / "search", steps=4, samples=3)
    assert (short.total_steps, len(short.data.eval or ()), short.config.training.warmup_steps) == (4, 3, 1)
    assert short.config.training.max_steps == 4


def test_a_methods_plan_that_does_not_fit_is_refused_with_what_to_set(home: Path) -> None:
    given = configuration(home, "run", "adalora")
    with pytest.raises(
        UsageError, match=r"final_steps is 2, .* max_steps 3 .*\(max_steps is that of find-lr: set --steps\)"
    ):
        plan_of(given, home / "search", steps=3)
