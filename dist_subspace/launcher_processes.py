"""Whether the launcher that started this process is still there. Local, Linux; elsewhere a launcher is never taken for gone.

torchrun is the parent of its ranks. The `deepspeed` command starts `deepspeed.launcher.launch`, which starts the ranks: when the
command is terminated, that one goes on, and so would the ranks, with nobody to stop them. A process that no launcher started
(`nohup dist-subspace train ... &`) may outlive whoever did.
"""

from __future__ import annotations

import os
from pathlib import Path

from dist_subspace.launchers import is_deepspeed, is_torchrun

_DEEPSPEED_COMMANDS = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "runner.py"}


class Launcher:
    """The launcher's processes, as they are when this is made: soon after this process began."""

    def __init__(self) -> None:
        by_deepspeed = is_deepspeed(os.environ)
        self._parent = os.getppid() if by_deepspeed or is_torchrun(os.environ) else None
        self._command: int | None = None
        if self._parent is not None and by_deepspeed:
            command = parent_of(self._parent)
            self._command = command if command is not None and _is_deepspeed_command(command) else None

    def gone(self) -> bool:
        if self._parent is None:
            return False
        if os.getppid() != self._parent:
            return True
        return self._command is not None and parent_of(self._parent) not in (self._command, None)


def parent_of(pid: int) -> int | None:
    """The parent of a process; None where it cannot be told."""
    fields = stat_of(pid)
    return None if fields is None else int(fields[1])


def stat_of(pid: int) -> list[str] | None:
    """State, parent and so on of a process: the fields of /proc/PID/stat behind the command's name; None without them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _is_deepspeed_command(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(Path(os.fsdecode(word)).name in _DEEPSPEED_COMMANDS for word in words[:4])
