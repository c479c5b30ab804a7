"""launch/slurm.sbatch as a person submits it, and what becomes of the job."""

from __future__ import annotations

import time
from pathlib import Path

from tests.cluster.slurm import Slurm
from tests.cluster.training import ENVIRONMENT, RUN_TIMEOUT
from tests.ranks import ROOT


def submit(slurm: Slurm, config: Path, run: Path, *options: str, changes: tuple[str, ...] = ()) -> str:
    """The job's number. The script is a copy without the line that asks for GPUs, as a person would edit it."""
    script = run.parent / "slurm.sbatch"
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    script.write_text("\n".join(line for line in lines if "--gpus-per-node" not in line) + "\n")
    shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={run.parent}/out-%a"]
    command = ["sbatch", "--parsable", *shape, *options, str(script), str(config), *changes]
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
