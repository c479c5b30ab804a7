"""Whole runs on preferences: the same on any number of ranks and for any micro-batch, and exact where they go on."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.run_folder.status import EXIT_OK
from tests.keys.preference_reference import pairs, singles
from tests.ranks import run_on_ranks
from tests.whole_runs import assert_same, records, run_here

ADAPTER = "checkpoint-3/adapter_model.safetensors"
pytest.importorskip("trl", reason="TRL is not installed (extra trl)")


def configuration(folder: Path, objective: str, run: Path, **training: Any) -> dict[str, Any]:
    """Six samples a step of six; a quarter of the eight is held out."""
    form, rows = ("unpaired-preference", singles()) if objective == "kto" else ("preference", pairs())
    file = folder / f"{form}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(folder / "model"), "storage": "nf4", "dtype": "fp32"},
        "subspace": {"method": "lora", "rank": 4},
        "data": {"train": str(file), "format": form, "max_length": 48, "eval": 0.25},
        "training": {
            **{"objective": objective, "max_steps": 3, "global_batch_size": 6, "learning_rate": 0.01},
            **{"lr_scheduler_type": "constant", "warmup_steps": 0},
            **training,
        },
        "checkpoint": {"save_steps": 2, "save_total_limit": None},
        "run": {"output_dir": str(run), "logging_steps": 1, "eval_steps": 2, "report_to": "none"},
    }


def figures(run: Path) -> list[float]:
    """The losses and the figures of rewards, of training and of evaluations, in their order."""
    names = ("loss", "eval_loss")
    return [
        value
        for line in records(run)
        for name, value in line.items()
        if name in names or name == "kl" or "rewards/" in name
    ]


@pytest.mark.parametrize("objective", ["kto", "orpo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_ranks_micro_batches_and_a_stop_on_the_way_make_no_difference(
    objective: str, folder: Path, tmp_path: Path
) -> None:
    alone = configuration(folder, objective, tmp_path / "alone", per_device_train_batch_size=6)
    assert run_here(alone | {"deepspeed": {"preset": "none"}}) == EXIT_OK
    shared = configuration(folder, objective, tmp_path / "shared", per_device_train_batch_size=2, max_steps=2)
    assert run_on_ranks(2, run_here, shared) == [EXIT_OK] * 2
    shared["training"]["max_steps"] = 3
    assert run_on_ranks(2, run_here, shared) == [EXIT_OK] * 2
    assert figures(tmp_path / "shared") == pytest.approx(figures(tmp_path / "alone"), rel=1e-4, abs=2e-5)


def test_a_run_that_goes_on_from_an_adapter_keeps_its_reference(folder: Path, tmp_path: Path) -> None:
    """`subspace.init_from` is read again: losses start at the logarithm of 2, and go on as if they had never stopped."""
    first = configuration(folder, "dpo", tmp_path / "first", max_steps=2) | {"deepspeed": {"preset": "none"}}
    assert run_here(first) == EXIT_OK
    whole = deepcopy(first)
    whole["run"]["output_dir"], whole["training"]["max_steps"] = str(tmp_path / "whole"), 3
    whole["subspace"] = {"init_from": str(tmp_path / "first")}
    assert run_here(whole) == EXIT_OK
    assert records(tmp_path / "whole")[1]["loss"] == pytest.approx(0.693147, abs=1e-5)
    parted = deepcopy(whole)
    parted["run"]["output_dir"], parted["training"]["max_steps"] = str(tmp_path / "parted"), 2
    assert run_here(parted) == EXIT_OK
    parted["training"]["max_steps"] = 3
    assert run_here(parted) == EXIT_OK
    assert figures(tmp_path / "parted")[-8:] == figures(tmp_path / "whole")[-8:]
    assert_same(tmp_path / "whole" / ADAPTER, tmp_path / "parted" / ADAPTER)
