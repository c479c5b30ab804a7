"""A SLURM of its own on hosts of `tests.cluster.hosts`: munge and slurmd on each of them, the controller on the first."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.cluster.hosts import Host, Hosts

PROGRAMS = {
    "/usr/sbin/munged": "munge",
    "/usr/sbin/slurmctld": "slurmctld",
    "/usr/sbin/slurmd": "slurmd",
    "srun": "slurm-client",
}
START = 30.0  # seconds in which all hosts are idle; a few, as a rule
CPUS = 2

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
JobRequeue=1
SchedulerParameters=sched_interval=5
MinJobAge=600
NodeName={nodes} CPUs={cpus} RealMemory=8000
{more}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


class Slurm:
    """Up with the block, and down with it; `run` is a command of SLURM's on the first host.

    Arguments:
        more: further lines of slurm.conf; they stand before the partition that all jobs go into.
    """

    def __init__(self, hosts: Hosts, folder: Path, more: str = "") -> None:
        self.hosts, self.folder, self._more = hosts, folder, more
        self.first = hosts[hosts.names[0]]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Slurm:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        nodes = ",".join(self.hosts.names)
        text = _CONFIGURATION.format(first=self.first.name, folder=self.folder, nodes=nodes, cpus=CPUS, more=self._more)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        try:
            for host in self.hosts:
                self._start_munge(host, key)
            self._start(self.first, ["/usr/sbin/slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
            for host in self.hosts:
                self._start(host, ["/usr/sbin/slurmd", "-D", "-N", host.name, "-f", self.environment["SLURM_CONF"]])
            self._wait_until_idle()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def run(
        self,
        command: Sequence[str],
        timeout: float,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A timeout always: `srun` waits for ever for a host that is not there."""
        return self.first.run(command, timeout, self.environment | (environment or {}), folder)

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ... (one state for each member of an array)."""
        shown = self.run(["squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T"], timeout=20)
        return " ".join(shown.stdout.split())

    def story(self, job: str) -> str:
        """What SLURM knows of a job, for a report."""
        shown = self.run(["scontrol", "show", "job", job], timeout=20).stdout
        lines = (self.folder / "slurmctld.log").read_text(errors="replace").splitlines()
        return "\n".join([shown, *(line for line in lines if f"JobId={job}" in line)])

    def lose(self, name: str) -> None:
        """A host ends, with all that runs on it, and says nothing."""
        self.hosts[name].end()

    def nodes(self) -> dict[str, str]:
        """The state of each node: idle, allocated, down, ..."""
        shown = self.run(["sinfo", "--noheader", "--Node", "--format=%N %T"], timeout=20)
        return {name: state.rstrip("*") for name, state in (line.split() for line in shown.stdout.splitlines())}

    def down(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()
        for daemon in self._daemons:
            daemon.communicate(timeout=20)
        self._daemons.clear()

    def _start(self, host: Host, command: Sequence[str]) -> None:
        """The daemons end with their host at the latest."""
        self._daemons.append(host.start(command, self.environment, timeout=3600))

    def _start_munge(self, host: Host, key: Path) -> None:
        own = host.folder / f"{host.name}-munge"
        own.mkdir(mode=0o700, exist_ok=True)
        host.run(["mkdir", "-p", "/run/munge"], timeout=10).check_returncode()
        command = ["/usr/sbin/munged", "--foreground", "--force", f"--key-file={key}", f"--log-file={own}/log"]
        self._start(host, [*command, f"--seed-file={own}/seed", "--pid-file=/run/munge/munged.pid"])
        deadline = time.monotonic() + START
        while host.run(["munge", "--no-input"], timeout=10).returncode:
            assert time.monotonic() < deadline, f"no munge on {host.name}: {(own / 'log').read_text()}"
            time.sleep(0.1)

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + START
        while True:
            shown = self.nodes()
            if shown == dict.fromkeys(self.hosts.names, "idle"):
                return
            assert time.monotonic() < deadline, f"SLURM did not start: {shown}{self._logs()}"
            time.sleep(0.2)

    def _logs(self) -> str:
        return "\n".join(file.read_text(errors="replace")[-2000:] for file in sorted(self.folder.glob("*.log")))
