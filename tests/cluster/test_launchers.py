"""One recipe under every launcher, on hosts with an address each, by the scripts that a person copies: as many ranks on one host
give the same losses and the same adapter, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.launching import hostfile, path_without_pdsh, script
from tests.cluster.slurm import Slurm
from tests.cluster.training import ENVIRONMENT, RUN_TIMEOUT, STEPS, Recipe, result

pytestmark = pytest.mark.cluster
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def check(done: subprocess.CompletedProcess[str], run: Path, recipe: Recipe, ranks: int) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count(f"finished after step {STEPS}") == 1, said  # rank 0 alone
    found = result(run)
    assert found.state == "finished" and len(found.losses) == STEPS
    assert found == recipe.alone(ranks)


@pytest.mark.parametrize("way", ["pdsh", "ssh"])
def test_deepspeed_with_a_hostfile_over_pdsh_and_over_plain_ssh(
    way: str, hosts: Hosts, recipe: Recipe, tmp_path: Path
) -> None:
    slots = {"node1": 2, "node2": 2} if way == "ssh" else {"node2": 1, "node3": 1}
    environment = ENVIRONMENT | {"HOSTFILE": hostfile(tmp_path, **slots), "HF_TOKEN": "hf_secret", "INTERFACE": "eth0"}
    if way == "ssh":
        environment["PATH"] = path_without_pdsh(tmp_path)
    first = hosts[next(iter(slots))]
    command = [script("deepspeed.sh"), *recipe.arguments(tmp_path / "run")]
    done = first.run(command, RUN_TIMEOUT, environment)
    check(done, tmp_path / "run", recipe, sum(slots.values()))
    assert "hf_secret" not in done.stdout + done.stderr
    assert ("pdsh" in done.stdout + done.stderr) == (way == "pdsh")


def test_torchrun_started_on_each_node_in_any_order(hosts: Hosts, recipe: Recipe, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"NODES": "3", "FIRST": "node1:29400"}
    command = [script("torchrun.sh"), *recipe.arguments(tmp_path / "run")]
    others = [hosts[name].start(command, environment, timeout=RUN_TIMEOUT) for name in ("node3", "node2")]
    first = hosts["node1"].run(command, RUN_TIMEOUT, environment)
    said = [process.communicate(timeout=60) for process in others]
    everything = first.stdout + first.stderr + "".join(map("".join, said))
    assert all(process.returncode == 0 for process in others), everything
    check(subprocess.CompletedProcess([], first.returncode, everything, ""), tmp_path / "run", recipe, 3)


def test_srun_starts_the_ranks_itself(slurm: Slurm, recipe: Recipe, tmp_path: Path) -> None:
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, *recipe.train(tmp_path / "run")]
    check(slurm.run(command, RUN_TIMEOUT, ENVIRONMENT), tmp_path / "run", recipe, 2)


def test_torchrun_inside_srun_is_decided_and_said(slurm: Slurm, recipe: Recipe, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=node1:29401", "--rdzv-id=a"]
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", *torchrun, *meeting, *recipe.train(tmp_path / "run")]
    done = slurm.run(command, RUN_TIMEOUT, ENVIRONMENT)
    check(done, tmp_path / "run", recipe, 2)
    assert done.stdout.count("started by torchrun within srun: torchrun says which rank this is\n") == 1


@pytest.mark.parametrize("program", ["mpirun.openmpi", "mpiexec.mpich"])
def test_mpi_starts_the_ranks(program: str, hosts: Hosts, recipe: Recipe, tmp_path: Path) -> None:
    if hosts["node1"].run(["which", program], timeout=10).returncode:
        pytest.skip(f"needs {program}: apt-get install --no-install-recommends openmpi-bin mpich")
    environment = ENVIRONMENT | AS_ROOT | {"HOSTS": "node1:1,node2:1", "MPIRUN": program, "HF_TOKEN": "hf_secret"}
    done = hosts["node1"].run([script("mpirun.sh"), *recipe.arguments(tmp_path / "run")], RUN_TIMEOUT, environment)
    check(done, tmp_path / "run", recipe, 2)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("node1 slots=1\nnode9 slots=1\n", "node9, of {file}, was not reached by ssh without a password"),
        ("# node1 slots=1\n", "HOSTFILE is {file}, which names no host"),
    ],
)
def test_a_wrong_hostfile_is_one_sentence(lines: str, sentence: str, hosts: Hosts, tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text(lines)
    done = hosts["node1"].run([script("deepspeed.sh"), "none.yaml"], 60, ENVIRONMENT | {"HOSTFILE": str(file)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "error: " + sentence.format(file=file)


def test_a_host_that_does_not_let_us_in_is_named(hosts: Hosts, tmp_path: Path) -> None:
    hosts["node3"].cut()
    try:
        environment = ENVIRONMENT | {"HOSTFILE": hostfile(tmp_path, node1=1, node3=1)}
        done = hosts["node1"].run([script("deepspeed.sh"), "none.yaml"], 60, environment)
    finally:
        hosts["node3"].mend()
    assert done.returncode == 2 and "error: node3, of " in done.stderr
