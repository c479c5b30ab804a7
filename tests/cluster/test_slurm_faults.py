"""What a cluster does to a job of launch/slurm.sbatch: a node that fails in the middle, and a job that matters more. The job goes
back into the queue by itself, goes on from its checkpoint, and ends as if nothing had been."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.hosts import PROGRAMS, Hosts, missing
from tests.cluster.slurm import PROGRAMS as SLURM_PROGRAMS
from tests.cluster.slurm import Slurm
from tests.cluster.slurm_jobs import said, submit, wait_for, wait_for_step
from tests.cluster.training import RUN_TIMEOUT, Recipe, result

pytestmark = pytest.mark.cluster
# A node that is silent for so many seconds is down. A job in `urgent` takes nodes from one in `all`, whose tasks hear SIGTERM
# and have GraceTime to leave.
CONFIGURATION = """\
SlurmdTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE"""
CONSTANT = ("training.lr_scheduler_type=constant", "training.warmup_steps=0")


@pytest.fixture
def frail(shared: Path, tmp_path: Path) -> Iterator[Slurm]:
    """A SLURM on hosts of its own, of which one may be lost."""
    if (why := missing(PROGRAMS) or missing(SLURM_PROGRAMS)) is not None:
        pytest.skip(why)
    folder = shared / f"frail-{tmp_path.name}"
    with Hosts(3, folder / "hosts") as hosts, Slurm(hosts, folder / "slurm", CONFIGURATION) as made:
        yield made


def endless(recipe: Recipe, folder: Path) -> Path:
    """The recipe without an end, which `shorten` gives it."""
    values = yaml.safe_load(recipe.config.read_text())
    values["training"] |= {"max_steps": 100_000, "lr_scheduler_type": "constant", "warmup_steps": 0}
    values["checkpoint"] = {"save_steps": 2}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def shorten(config: Path, steps: int) -> None:
    """The job reads it when it begins again."""
    values = yaml.safe_load(config.read_text())
    values["training"]["max_steps"] = steps
    config.write_text(yaml.safe_dump(values))


def newest(run: Path) -> int:
    return max(int(path.parent.name.rpartition("-")[2]) for path in run.glob("checkpoint-*/MANIFEST.json"))


def wait_until(condition: object, what: str) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(1)


@pytest.mark.parametrize("nodes", ["node1,node2", "node2,node3"])
def test_a_job_that_loses_a_node_goes_on_without_it(nodes: str, frail: Slurm, recipe: Recipe, tmp_path: Path) -> None:
    """node2 is lost: where rank 1 is, or where the job's script and rank 0 are."""
    run, config = tmp_path / "run", endless(recipe, tmp_path)
    job = submit(frail, config, run, "--time=30", f"--nodelist={nodes}")
    wait_for_step(run, 5)
    frail.lose("node2")
    wait_until(lambda: frail.nodes()["node2"] == "down", f"{frail.nodes()}")
    wait_until(lambda: frail.state(job) == "PENDING", frail.story(job) + said(tmp_path))
    total = newest(run) + 3
    shorten(config, total)
    # The list was for the test to know whom to lose; what is asked for is two nodes.
    frail.run(["scontrol", "update", f"jobid={job}", "ReqNodeList="], timeout=20).check_returncode()
    # SLURM itself waits for two minutes, in which a run that may still live on a node that is only silent has ended.
    wait_for(frail, job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", hasten=nodes.startswith("node1"))
    story = frail.story(job)
    print(said(tmp_path), story, sep="\n")
    assert frail.state(job) == "COMPLETED", said(tmp_path) + story
    assert "NodeList=node[1,3]" in story and "Restarts=1" in story, story
    assert result(run) == recipe.alone(2, f"training.max_steps={total}", *CONSTANT)


def test_a_job_that_is_preempted_saves_waits_and_goes_on(frail: Slurm, recipe: Recipe, tmp_path: Path) -> None:
    run, config = tmp_path / "run", endless(recipe, tmp_path)
    job = submit(frail, config, run, "--time=30")
    wait_for_step(run, 5)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nhostname\nsleep 3\n")
    asked = [
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=3",
        "--exclusive",
        f"--output={tmp_path}/urgent.out",
    ]
    other = frail.run([*asked, str(urgent)], timeout=60).stdout.strip()
    wait_for(frail, other, "COMPLETED", "FAILED")
    assert frail.state(other) == "COMPLETED", frail.story(other) + frail.story(job)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted", (status, said(tmp_path), frail.story(job))
    total = status["step"] + 3
    assert newest(run) == status["step"], "it has saved what it had"
    shorten(config, total)
    wait_for(frail, job, "COMPLETED", "FAILED", "CANCELLED", "PREEMPTED", hasten=True)
    print(said(tmp_path), frail.story(other), frail.story(job), sep="\n")
    assert frail.state(job) == "COMPLETED", said(tmp_path) + frail.story(job)
    assert result(run) == recipe.alone(2, f"training.max_steps={total}", *CONSTANT)
