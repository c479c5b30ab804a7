"""Hosts that share nothing of a run: its folder, the model, the data and all caches lie on each host's own disk. The run is that
of hosts that share a disk, bit for bit; and what only one host has is found there, or asked for by that host's name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.hosts import DISK, Host, Hosts
from tests.cluster.training import ENVIRONMENT, RUN_TIMEOUT, Recipe, result

pytestmark = pytest.mark.cluster
RUN = f"{DISK}/run"
PLACES = (f"model.path={DISK}/model", f"data.train={DISK}/train.jsonl", f"run.output_dir={RUN}")
# What is read may not lie anywhere else.
OWN = ENVIRONMENT | {"HF_HOME": f"{DISK}/hub", "TMPDIR": f"{DISK}/tmp"}
CONSTANT = ("training.lr_scheduler_type=constant", "training.warmup_steps=0")


@pytest.fixture
def apart(hosts: Hosts, recipe: Recipe) -> Iterator[Hosts]:
    """The hosts, with a copy of model and data each, and nothing else on their disks."""
    for host in hosts:
        clear(host)
        (host.disk / "tmp").mkdir()
        shutil.copytree(recipe.folder / "model", host.disk / "model")
        shutil.copy(recipe.folder / "train.jsonl", host.disk)
    yield hosts
    for host in hosts:
        clear(host)


def clear(host: Host) -> None:
    for path in host.disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def start(hosts: Hosts, names: Sequence[str], recipe: Recipe, *changes: str) -> list[subprocess.Popen[str]]:
    """One rank on each host, in this order."""
    command = [sys.executable, *recipe.train(Path(RUN), *PLACES, *changes)]
    meeting = {"WORLD_SIZE": str(len(names)), "LOCAL_RANK": "0", "MASTER_ADDR": names[0], "MASTER_PORT": "29500"}
    return [
        hosts[name].start(command, OWN | meeting | {"RANK": str(rank)}, timeout=RUN_TIMEOUT)
        for rank, name in enumerate(names)
    ]


def together(hosts: Hosts, names: Sequence[str], recipe: Recipe, *changes: str) -> tuple[set[int], str]:
    """The exit statuses of all ranks, and what they said."""
    processes = start(hosts, names, recipe, *changes)
    said = "".join(text for process in processes for text in process.communicate(timeout=RUN_TIMEOUT + 30))
    print(said, *(f"{host.name}: {' '.join(sorted(files(host)))}" for host in hosts), sep="\n")
    return {process.returncode for process in processes}, said


def files(host: Host) -> set[str]:
    """The folders of tokens, and what of a run's folder there is."""
    found = {path.parent.parent.relative_to(host.disk).as_posix() for path in host.disk.rglob("columns.json")}
    return {*found, *(["run"] if (host.disk / "run").exists() else [])}


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_the_run_is_that_of_hosts_that_share_a_disk_and_each_host_keeps_its_own(apart: Hosts, recipe: Recipe) -> None:
    statuses, said = together(apart, apart.names, recipe)
    assert statuses == {0}, said
    assert result(apart["node1"].disk / "run") == recipe.alone(3)
    assert files(apart["node1"]) == {"run", "run/tokens"}
    for name in ("node2", "node3"):
        (tokens,) = files(apart[name])
        assert tokens.startswith("tmp/dist_subspace-root/run-") and tokens.endswith("/tokens")
    # What the run has made is read where it lies: by a second run that begins with it, and by a command.
    begun = "subspace.init_from=/mnt/run/adapter"
    other = f"run.output_dir={DISK}/second"
    statuses, said = together(apart, ["node1", "node3"], recipe, begun, other)
    assert statuses == {0}, said
    assert result(apart["node1"].disk / "second") == recipe.alone(2, begun)
    export = [sys.executable, "-m", "dist_subspace", "export", f"{DISK}/second/adapter", f"{DISK}/exported"]
    done = apart["node1"].run(export, RUN_TIMEOUT, OWN)
    assert done.returncode == 0 and (apart["node1"].disk / "exported" / "adapter_config.json").is_file(), done.stderr


@pytest.mark.parametrize("method", ["pissa", "spectral-additive"])
def test_a_run_that_was_killed_goes_on_where_only_rank_0_has_its_checkpoints_and_factors(
    method: str, apart: Hosts, recipe: Recipe
) -> None:
    names, run = ["node2", "node1"], apart["node2"].disk / "run"
    changes = (f"subspace.method={method}", "checkpoint.save_steps=1", *CONSTANT)
    processes = start(apart, names, recipe, *changes, "training.max_steps=100000")
    wait_for(run / "checkpoint-2" / "MANIFEST.json", processes)
    pid = json.loads((run / "status.json").read_text())["pid"]
    apart["node2"].run(["kill", "-9", str(pid)], timeout=10).check_returncode()
    for process in processes:
        process.communicate(timeout=RUN_TIMEOUT)
    newest = max(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*"))
    total = f"training.max_steps={newest + 2}"
    statuses, said = together(apart, names[::-1], recipe, *changes, total)
    assert statuses == {2}, said
    assert errors(said) == [
        f"error: run.output_dir is '/mnt/run', where node2 (rank 1) has checkpoint-{newest} and node1, where rank 0 is, has none"
        "; accepted: rank 0 started on node2, the folder copied to node1, another run.output_dir, or checkpoint.resume=none to "
        "begin anew"
    ]
    statuses, said = together(apart, names, recipe, *changes, total)
    assert statuses == {0}, said
    assert result(run) == recipe.alone(2, *changes, total)
    assert (run / "factors").is_dir() and "factors" not in {path.name for path in apart["node1"].disk.rglob("*")}


def test_a_host_with_other_data_or_none_is_named(apart: Hosts, recipe: Recipe) -> None:
    file = apart["node3"].disk / "train.jsonl"
    file.write_text(file.read_text().replace("say 3", "say 4"))
    statuses, said = together(apart, apart.names, recipe)
    assert statuses == {2} and errors(said) == [
        "error: data.train is '/mnt/train.jsonl' on node3 (rank 2), which holds other data than '/mnt/train.jsonl' on node1 "
        "(rank 0); accepted: the same data on every node"
    ], said
    file.unlink()
    statuses, said = together(apart, apart.names, recipe)
    assert statuses == {2}, said
    assert errors(said) == ["error: on node3 (rank 2): data.train is '/mnt/train.jsonl'; there is no such file"]
    assert [(host.disk / "run").exists() for host in apart] == [True, False, False]


def wait_for(file: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT
    while not file.exists():
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
