"""The doctor on hosts with an address, a name and disks each: healthy, and broken in many ways, each named with its host and what
to do; every rank that was started leaves with the same status."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, Hosts
from tests.cluster.slurm import Slurm
from tests.cluster.training import ENVIRONMENT, Recipe
from tests.ranks import ROOT, free_port

pytestmark = pytest.mark.cluster
TIMEOUT = 240.0
PATIENCE = ["--patience", "150"]  # where the machine is loaded; a later one counts
DOCTOR = [sys.executable, "-m", "dist_subspace", "doctor"]
SITE = Path(pytest.__file__).parents[1]
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


@dataclass(frozen=True)
class Said:
    """What the ranks printed, as one text, and the status of each."""

    text: str
    statuses: list[int]

    @property
    def breaking(self) -> list[str]:
        """The findings that break a run, each with what to do, without line breaks."""
        _, _, after = self.text.partition("What will break, the worst first:\n")
        listed = after.partition("\n\n")[0]
        return [" ".join(part.split()) for part in re.split(r"^ +\d+\. ", listed, flags=re.MULTILINE) if part.strip()]


def ask(
    hosts: Hosts,
    *arguments: str,
    names: Sequence[str] = ("node1", "node2", "node3"),
    changes: Mapping[str, Mapping[str, str]] | None = None,
) -> Said:
    """One rank a host, started by hand; `changes`: a host's own environment."""
    common = ENVIRONMENT | {
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": str(free_port()),
        "COLUMNS": "120",
    }
    processes = []
    for name in names:
        own = common | {"RANK": str(int(name[-1]) - 1), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        changed = [f"{key}={value}" for key, value in (changes or {}).get(name, {}).items()]
        # By `env`, within the host: a library that is loaded first would begin outside of it.
        processes.append(hosts[name].start(["env", *changed, *DOCTOR, *PATIENCE, *arguments], own, timeout=TIMEOUT))
    said = [process.communicate(timeout=TIMEOUT + 30) for process in processes]
    return Said("".join(map("".join, said)), [process.returncode for process in processes])


@contextlib.contextmanager
def mounted(host: Host, *options: str, at: str) -> Iterator[None]:
    """A disk in memory over a folder of one host."""
    host.run(["mkdir", "-p", at], timeout=10).check_returncode()
    host.run(["mount", "-t", "tmpfs", *options, "tmpfs", at], timeout=10).check_returncode()
    try:
        yield
    finally:
        host.run(["umount", "-l", at], timeout=10).check_returncode()


def check_named(said: Said, *words: str, do: str) -> None:
    """The worst finding has these words in this order, and says what to do; all ranks left with 1."""
    assert set(said.statuses) == {1}, said.text
    assert said.breaking, said.text
    print(said.breaking[0])
    first, _, advice = said.breaking[0].partition(" -> ")
    place = 0
    for word in words:
        place = first.find(word, place)
        assert place >= 0, f"{word!r}: {said.text}"
    assert do in advice, said.text


def test_three_healthy_hosts_under_torchrun(hosts: Hosts, recipe: Recipe, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=3", "--nproc_per_node=1", "--rdzv-id=doctor"]
    command = [*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29402", "-m", "dist_subspace", "doctor"]
    command += [str(recipe.config), f"run.output_dir={tmp_path / 'run'}"]
    environment = ENVIRONMENT | {"COLUMNS": "120"}
    others = [hosts[name].start(command, environment, timeout=TIMEOUT) for name in ("node3", "node2")]
    done = hosts["node1"].run(command, TIMEOUT, environment)
    said = [process.communicate(timeout=60) for process in others]
    everything = done.stdout + done.stderr + "".join(map("".join, said))
    assert [done.returncode, *(process.returncode for process in others)] == [0, 0, 0], everything
    print(everything)
    assert "3 ranks on 3 nodes (node1, node2, node3), started by torchrun" in everything
    for pair in ("node1 - node2", "node1 - node3", "node2 - node3"):
        assert pair in everything
    lines = {line[15:].split("  ")[0].strip(): line for line in everything.splitlines()}
    assert "shared by all nodes" in lines["run folder"] and "the node's own" in lines["hub cache"]
    assert "eth0, 10.77.0.1" in everything and "Nothing was found that breaks a run." in everything
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".*"))


def test_every_task_of_srun_is_examined(slurm: Slurm) -> None:
    done = slurm.run(["srun", "--nodes=3", "--ntasks-per-node=1", *DOCTOR], TIMEOUT, ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 ranks on 3 nodes (node1, node2, node3), started by srun" in done.stdout


def test_another_version_of_a_package(hosts: Hosts, tmp_path: Path) -> None:
    described = tmp_path / "bitsandbytes-0.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.1\n")
    said = ask(hosts, changes={"node2": {"PYTHONPATH": f"{tmp_path}:{ROOT}"}})
    check_named(
        said, "node2 (rank 1): bitsandbytes is 0.1, and ", "node1, node3", do="use the same environment on every node"
    )


def test_another_commit_of_this_package(hosts: Hosts, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dist_subspace", tmp_path / "dist_subspace")
    (tmp_path / "dist_subspace" / "extra.py").write_text("")
    said = ask(hosts, changes={"node3": {"PYTHONPATH": str(tmp_path)}})
    check_named(
        said, "node3 (rank 2): the files of this package are others", "node1, node2", do="check out the same commit"
    )


def test_a_package_that_is_missing(hosts: Hosts) -> None:
    with contextlib.ExitStack() as stack:
        for folder in SITE.glob("bitsandbytes*"):
            stack.enter_context(mounted(hosts["node2"], at=str(folder)))
        said = ask(hosts)
    check_named(
        said, "node2 (rank 1): bitsandbytes is not installed for ", sys.executable, do="-m pip install bitsandbytes"
    )


def test_a_clock_that_is_wrong(hosts: Hosts) -> None:
    if not Path(FAKETIME).exists():
        pytest.skip("needs faketime: apt-get install --no-install-recommends faketime")
    said = ask(hosts, changes={"node2": {"LD_PRELOAD": FAKETIME, "FAKETIME": "+2h"}})
    check_named(said, "node2 (rank 1): the clock is 2.0 hours ahead of that of node1", do="chrony")


def test_a_port_that_is_closed_between_two_hosts(hosts: Hosts) -> None:
    """New connections alone: answers to those of the other side pass."""
    if hosts["node1"].run(["which", "nft"], timeout=10).returncode:
        pytest.skip("needs nft: apt-get install --no-install-recommends nftables")
    rule = "ip saddr 10.77.0.3 tcp dport 32768-60999 tcp flags & (syn | ack) == syn drop"
    table = f"table inet doctor {{ chain input {{ type filter hook input priority 0; {rule}; }}; }}"
    hosts["node1"].run(["nft", table], timeout=10).check_returncode()
    try:
        said = ask(hosts)
    finally:
        hosts["node1"].run(["nft", "delete table inet doctor"], timeout=10).check_returncode()
    check_named(
        said, "node3 (rank 2): node3 does not reach node1 at port ", do="let the firewall pass TCP between the nodes"
    )
    assert "all-reduce, gloo, 2 ranks" in said.text, "the others are measured all the same"


def test_a_disk_that_is_full(hosts: Hosts, recipe: Recipe) -> None:
    with mounted(hosts["node1"], "-o", "size=1m", at="/mnt/full"):
        said = ask(hosts, str(recipe.config), "run.output_dir=/mnt/full/run")
    check_named(
        said,
        "node1 (rank 0): run.output_dir (/mnt/full/run) has 1 MiB free, and the run writes there",
        do="make room",
    )


def test_a_small_shared_memory(hosts: Hosts) -> None:
    with mounted(hosts["node3"], "-o", "size=1m", at="/dev/shm"):
        said = ask(hosts)
    check_named(said, "node3 (rank 2): /dev/shm has 1 MiB free of 1 MiB", do="--shm-size")


def test_a_run_folder_that_is_read_only(hosts: Hosts, recipe: Recipe) -> None:
    with mounted(hosts["node1"], "-o", "ro", at="/mnt/read-only"):
        said = ask(hosts, str(recipe.config), "run.output_dir=/mnt/read-only/run")
    check_named(
        said,
        "node1 (rank 0): run.output_dir (/mnt/read-only/run) cannot be written to (Read-only file system",
        do="name another folder (run.output_dir)",
    )


def test_a_rank_that_never_starts(hosts: Hosts) -> None:
    said = ask(hosts, "--patience", "45", names=("node1", "node2"))
    check_named(said, "rank 2 of 3 did not answer in 45 seconds", do="look whether it was started there")
    assert "2 of 3 ranks on 2 nodes (node1, node2)" in said.text


def test_a_meeting_that_one_host_does_not_reach(hosts: Hosts) -> None:
    hosts["node2"].cut()
    try:
        said = ask(hosts, "--patience", "45")
    finally:
        hosts["node2"].mend()
    check_named(said, "rank 1 of 3 did not answer in 45 seconds", do="whether its node reaches rank 0's")
    assert "error: rank 1, on node2, did not reach rank 0 at node1:" in said.text


def test_a_file_of_the_run_that_one_host_lacks(hosts: Hosts, recipe: Recipe, tmp_path: Path) -> None:
    data = "/mnt/train.jsonl"
    for name in ("node1", "node2"):
        copy = ["cp", str(recipe.folder / "train.jsonl"), data]
        hosts[name].run(copy, timeout=10).check_returncode()
    said = ask(hosts, str(recipe.config), f"data.train={data}", f"run.output_dir={tmp_path / 'run'}")
    check_named(
        said, f"node3 (rank 2): data.train is '{data}', which is not there", do="copy it to the same path there"
    )
