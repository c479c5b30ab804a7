"""launch/slurm.sbatch as a person submits it: a job that reaches its time limit goes back into the queue by itself and finishes
with the result of a run that was never stopped; one that is cancelled does not; an array is one run a seed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.cluster.training import ENVIRONMENT, RUN_TIMEOUT, Recipe, result
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster
# Steps, which take longer than the job has until SLURM, which looks twice a minute, says that its two minutes will be over.
LONG = 180


def submit(slurm: Slurm, recipe: Recipe, run: Path, *options: str, changes: tuple[str, ...] = ()) -> str:
    """The job's number. The script is a copy without the line that asks for GPUs, as a person would edit it."""
    script = run.parent / "slurm.sbatch"
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    script.write_text("\n".join(line for line in lines if "--gpus-per-node" not in line) + "\n")
    shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={run.parent}/out-%a"]
    command = ["sbatch", "--parsable", *shape, *options, str(script), str(recipe.config), *changes]
    done = slurm.run(command, 60, ENVIRONMENT | {"RUN": str(run)}, folder=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(slurm: Slurm, job: str, *states: str, hasten: bool = False) -> None:
    """Until every member of the job has one of the states. `hasten`: what is requeued begins in seconds, not in two minutes;
    not at once, as SLURM revokes the job's credential for a moment."""
    deadline, pending = time.monotonic() + 2 * RUN_TIMEOUT, 0
    while not set(state := slurm.state(job).split()) <= set(states) or not state:
        assert time.monotonic() < deadline, f"{job}: {state}"
        pending = pending + 1 if "PENDING" in state else 0
        if hasten and pending > 5:
            slurm.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], timeout=20)
        time.sleep(1)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT
    while f'"step": {step}' not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def said(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("out-*")))


def test_a_job_that_reaches_its_time_limit_is_requeued_and_finishes_as_if_nothing_had_been(
    slurm: Slurm, recipe: Recipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, recipe, run, "--time=2", "--signal=USR1@75", changes=(f"training.max_steps={LONG}",))
    wait_for(slurm, job, "COMPLETED", "FAILED", "TIMEOUT", hasten=True)
    assert slurm.state(job) == "COMPLETED", said(tmp_path) + slurm.story(job)
    assert "interrupted by signal SIGUSR1 after step " in said(tmp_path)
    assert result(run) == recipe.alone(2, f"training.max_steps={LONG}")


def test_a_job_that_is_cancelled_does_not_come_back(slurm: Slurm, recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, recipe, run, "--time=10", changes=("training.max_steps=100000", "run.logging_steps=10"))
    wait_for_step(run, 10)
    slurm.run(["scancel", job], timeout=20).check_returncode()
    wait_for(slurm, job, "CANCELLED")
    time.sleep(3)
    assert slurm.state(job) == "CANCELLED", said(tmp_path)


def test_an_array_is_one_run_a_seed(slurm: Slurm, recipe: Recipe, tmp_path: Path) -> None:
    job = submit(slurm, recipe, tmp_path / "run", "--array=0-1%1", "--time=10")
    wait_for(slurm, job, "COMPLETED", "FAILED")
    assert slurm.state(job) == "COMPLETED COMPLETED", said(tmp_path)
    first, second = (result(tmp_path / f"run-seed{seed}") for seed in (0, 1))
    assert first == recipe.alone(2)  # whose seed is 0
    assert second.state == "finished" and second.losses != first.losses
