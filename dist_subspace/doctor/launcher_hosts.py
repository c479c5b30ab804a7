"""On which host a rank that never came should be, where the launcher's own list of hosts says so."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dist_subspace.launchers import tasks_of_node


def expected_host(rank: int, variables: Mapping[str, str] = os.environ) -> str | None:
    """The host of a rank; None where the launcher does not tell it to the others."""
    hosts = of_deepspeed(_command_line(os.getppid())) or of_slurm(variables) or []
    return hosts[rank] if rank < len(hosts) else None


def of_deepspeed(command: list[str]) -> list[str]:
    """The host of each rank, from the command line of DeepSpeed's launcher on a node; empty for other commands."""
    option = "--world_info="
    coded = next((word.removeprefix(option) for word in command if word.startswith(option)), None)
    if coded is None:
        return []
    try:
        world = json.loads(base64.urlsafe_b64decode(coded))
        return [str(host) for host, slots in world.items() for _ in slots]
    except (ValueError, AttributeError, TypeError):
        return []


def of_slurm(variables: Mapping[str, str]) -> list[str]:
    """The host of each task of a step whose tasks are dealt node by node; empty outside of one."""
    nodes = variables.get("SLURM_STEP_NODELIST")
    if nodes is None or "SLURM_STEP_ID" not in variables:
        return []
    tasks = variables.get("SLURM_STEP_TASKS_PER_NODE", "")
    return [host for node, host in enumerate(hosts_of_list(nodes)) for _ in range(tasks_of_node(tasks, node) or 0)]


def hosts_of_list(nodes: str) -> list[str]:
    """SLURM's list of hosts, written out by SLURM itself, else the names of a list without brackets."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10)
        if done.returncode == 0:
            return done.stdout.split()
    except (OSError, subprocess.SubprocessError):
        pass
    return [] if re.search(r"[\[\]]", nodes) else nodes.split(",")


def _command_line(pid: int) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    except OSError:
        return []
