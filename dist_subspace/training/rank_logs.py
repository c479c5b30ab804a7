"""What a rank says beside the screen: its own log, `run.local_dir`/.../logs/rank-<rank>.log, and the end of it in RUN/logs.

Descriptors are moved, so that what C libraries, tracebacks and child processes write goes there too. The screen is kept
for the last words. Only the `train` command does this; whoever calls the library keeps the descriptors.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from dist_subspace.atomic_files import write_text_atomic
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.run_folder.local import LocalFolder

LINES = 200  # of a failing rank's log that come into RUN/logs
_BYTES = 2**18  # of them at most
_LARGE = 2**25  # bytes of a log; what is older goes into rank-<rank>.log.1, and then away
_LOOK = 10.0  # seconds between two looks at its size


class RankLog:
    """The file that this process says into from now on, and the screen that it said on before."""

    def __init__(self, folder: LocalFolder, rank: int, heading: str, descriptors: Sequence[int] = (1, 2)) -> None:
        """Moves these descriptors; they stay there until the process ends.

        Raises:
            UsageError: the file cannot be written.
        """
        self.path = folder.log(rank)
        try:
            folder.make()
            folder.logs.mkdir(exist_ok=True)
            _set_aside_large(self.path)
            log = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"run.local_dir is {folder.path.parent} on {socket.gethostname()}, where rank {rank} cannot write its log "
                f"({error}); accepted: a folder on a disk of each node that this user can write to"
            ) from None
        os.write(log, heading.encode())
        _flush()
        self.screen: TextIO = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
        for number in descriptors:
            os.dup2(log, number)
        os.close(log)
        for stream in (sys.stdout, sys.stderr):  # line by line: whoever is killed leaves what it has said
            with suppress(AttributeError):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        threading.Thread(target=self._keep_small, name="log", daemon=True).start()

    def _keep_small(self) -> None:
        while not threading.Event().wait(_LOOK):
            with suppress(OSError):
                _cut_large(self.path)


def heading(output_dir: str) -> str:
    """The first line of an attempt in a log to which earlier attempts have written."""
    now, host = datetime.now(UTC).isoformat(timespec="seconds"), socket.gethostname()
    return f"=== {now} rank {world().rank} of {world().size}, process {os.getpid()} on {host}, of {output_dir}\n"


def last_lines(path: Path) -> str:
    """The last lines of a log; empty where there is none that this process sees."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _BYTES))
            return "".join(deque(file.read().decode(errors="replace").splitlines(keepends=True), maxlen=LINES))
    except OSError:
        return ""


def keep_last_lines(run: RunFolder, rank: int, text: str) -> None:
    """Write what a failing rank said last into RUN/logs. Where the disk refuses, the screen must do."""
    with suppress(OSError):
        run.logs.mkdir(parents=True, exist_ok=True)
        write_text_atomic(run.log(rank), text)


def _set_aside_large(path: Path) -> None:
    if path.exists() and path.stat().st_size > _LARGE:
        path.replace(path.with_name(f"{path.name}.1"))


def _cut_large(path: Path) -> None:
    """While it is written to: everyone appends, and goes on at the new end."""
    if path.stat().st_size > _LARGE:
        earlier = path.with_name(f"{path.name}.1")
        earlier.write_bytes(path.read_bytes())
        earlier.chmod(0o600)
        os.truncate(path, 0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
