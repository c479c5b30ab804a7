"""launch/slurm.sbatch as a person submits it: a job that reaches its time limit goes back into the queue by itself and finishes
with the result of a run that was never stopped; one that is cancelled does not; an array is one run a seed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.cluster.slurm import Slurm
from tests.cluster.slurm_jobs import said, submit, wait_for, wait_for_step
from tests.cluster.training import RUN_TIMEOUT, Recipe, result

pytestmark = pytest.mark.cluster


def step_when_interrupted(slurm: Slurm, job: str, run: Path) -> int:
    """The step after which the run was interrupted and saved. One that SLURM stops while it starts begins again."""
    deadline = time.monotonic() + 2 * RUN_TIMEOUT
    while True:
        wait_for(slurm, job, "RUNNING", "PENDING", "COMPLETING")
        if slurm.state(job) == "PENDING":
            time.sleep(5)
            slurm.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], timeout=20)
        status = json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {}
        if status.get("state") == "interrupted" and status["step"] > 0:
            return int(status["step"])
        assert time.monotonic() < deadline, said(run.parent) + slurm.story(job)
        time.sleep(1)


def test_a_job_that_reaches_its_time_limit_is_requeued_and_finishes_as_if_nothing_had_been(
    slurm: Slurm, recipe: Recipe, tmp_path: Path
) -> None:
    """Its length follows from where it was stopped: SLURM's signal comes up to a minute before its time."""
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    values = yaml.safe_load(recipe.config.read_text())
    values["training"] |= {"max_steps": 100_000, "lr_scheduler_type": "constant", "warmup_steps": 0}
    config.write_text(yaml.safe_dump(values))
    job = submit(slurm, config, run, "--time=2", "--signal=USR1@30")
    stopped = step_when_interrupted(slurm, job, run)
    total = stopped + 3
    values["training"]["max_steps"] = total
    config.write_text(yaml.safe_dump(values))
    wait_for(slurm, job, "COMPLETED", "FAILED", "TIMEOUT", hasten=True)
    assert slurm.state(job) == "COMPLETED", said(tmp_path) + slurm.story(job)
    assert f"interrupted by signal SIGUSR1 after step {stopped}; " in said(tmp_path)
    assert "DUE TO TIME LIMIT" not in said(tmp_path)
    constant = ("training.lr_scheduler_type=constant", "training.warmup_steps=0")
    assert result(run) == recipe.alone(2, f"training.max_steps={total}", *constant)


def test_a_job_that_is_cancelled_does_not_come_back(slurm: Slurm, recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, recipe.config, run, "--time=10", changes=("training.max_steps=100000", "run.logging_steps=10"))
    wait_for_step(run, 10)
    slurm.run(["scancel", job], timeout=20).check_returncode()
    wait_for(slurm, job, "CANCELLED")
    time.sleep(3)
    assert slurm.state(job) == "CANCELLED", said(tmp_path)


def test_an_array_is_one_run_a_seed(slurm: Slurm, recipe: Recipe, tmp_path: Path) -> None:
    job = submit(slurm, recipe.config, tmp_path / "run", "--array=0-1%1", "--time=10")
    wait_for(slurm, job, "COMPLETED", "FAILED")
    assert slurm.state(job) == "COMPLETED COMPLETED", said(tmp_path)
    first, second = (result(tmp_path / f"run-seed{seed}") for seed in (0, 1))
    assert first == recipe.alone(2)  # whose seed is 0
    assert second.state == "finished" and second.losses != first.losses
