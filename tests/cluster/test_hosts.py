"""The hosts are what they shall stand for: apart from each other and from this machine, and gone when their maker is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import DISK, Hosts
from tests.cluster.slurm import Slurm
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster
MAKER = """
import sys, time
from pathlib import Path
from tests.cluster.hosts import Hosts
with Hosts(2, Path(sys.argv[1])) as hosts:
    print(*(host.pid for host in hosts), flush=True)
    time.sleep(60)
"""


def said(hosts: Hosts, name: str, *command: str) -> str:
    done = hosts[name].run(command, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_host_has_its_name_its_address_and_its_way_to_the_others(hosts: Hosts) -> None:
    for name in hosts.names:
        assert said(hosts, name, "hostname") == name
        assert hosts[name].address in said(hosts, name, "ip", "-4", "-br", "address")
        for other in hosts.names:
            assert said(hosts, name, "ssh", other, "hostname") == other
    everywhere = said(hosts, "node1", "pdsh", "-R", "ssh", "-w", "node[1-3]", "hostname")
    assert sorted(everywhere.splitlines()) == [f"{name}: {name}" for name in hosts.names]
    assert "default" not in said(hosts, "node1", "ip", "route")  # and none out of here


def test_what_a_host_writes_on_its_disk_no_other_sees(hosts: Hosts, shared: Path) -> None:
    said(hosts, "node1", "touch", f"{DISK}/mine", "/root/.cache/mine", "/dev/shm/mine", str(shared / "ours"))
    for name, there in (("node1", 0), ("node2", 2)):
        for file in (f"{DISK}/mine", "/root/.cache/mine", "/dev/shm/mine"):
            assert hosts[name].run(["ls", file], timeout=10).returncode == there
        assert hosts[name].run(["ls", str(shared / "ours")], timeout=10).returncode == 0
    assert not Path(DISK, "mine").exists()


def test_a_host_whose_cable_is_cut_is_out_of_reach_until_it_is_mended(hosts: Hosts) -> None:
    hosts["node3"].cut()
    assert hosts["node1"].run(["ssh", "-o", "ConnectTimeout=1", "node3", "true"], timeout=20).returncode == 255
    hosts["node3"].mend()
    assert hosts["node1"].run(["ssh", "node3", "true"], timeout=20).returncode == 0


def test_a_command_that_takes_too_long_ends_with_all_that_it_started(hosts: Hosts) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        hosts["node1"].run(["bash", "-c", "sleep 1234 & sleep 1234"], timeout=0.5)
    assert "sleep 1234" not in said(hosts, "node1", "ps", "-eo", "args")


def test_hosts_end_with_their_maker_also_when_it_is_killed(hosts: Hosts, tmp_path: Path) -> None:
    """Beside the hosts of the other tests: two sets of one address do not meet."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    pids = [int(pid) for pid in maker.stdout.readline().split()]
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_slurm_runs_a_step_on_all_hosts_and_a_job_after_it(slurm: Slurm, shared: Path) -> None:
    step = slurm.run(["srun", "--nodes=3", "hostname"], timeout=30)
    assert sorted(step.stdout.split()) == slurm.hosts.names, step.stderr
    job = shared / "job.sh"
    job.write_text("#!/bin/sh\nsrun hostname\n")
    done = slurm.run(["sbatch", "--wait", "--nodes=2", f"--output={shared}/job.out", str(job)], timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted((shared / "job.out").read_text().split()) == ["node1", "node2"]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
