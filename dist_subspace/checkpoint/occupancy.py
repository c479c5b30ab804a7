"""One run at a time in a run's folder. Local: rank 0 alone.

RUN/.lock is locked by the operating system for as long as rank 0's process lives, however it ends. The lock is POSIX's
(`fcntl.lockf`), which no child process inherits: workers that outlive a killed run do not keep the folder. It goes when this
process closes any descriptor of the file, so nothing else here opens it once it is held.

Where locks do not reach another host, RUN/status.json tells: a run writes its host, its process and, every few seconds, the
time into it (its heartbeat).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import write_text_atomic
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import RunFolder, StrPath
from dist_subspace.run_folder.status import State, read_status, write_status

BEAT = 10.0  # seconds between two heartbeats where nothing changes
SOON = 1.0  # seconds between two of them where steps are made: a disk far away is not asked for more
ALIVE = 60.0  # seconds after which a run whose heartbeat has stopped counts as dead
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class Occupancy:
    """This process's hold on a run's folder: the lock, and the status file that is kept young while it lasts."""

    def __init__(self, run_dir: StrPath, in_passing: bool = False) -> None:
        """Take the folder, which must be there.

        Arguments:
            in_passing: at its release the status file is as it was.

        Raises:
            UsageError: another run has it. Nothing in the folder was changed then.
        """
        self.run = RunFolder(run_dir)
        self._descriptor = _locked(self.run)
        _HELD.add(self.run.path.resolve())
        try:
            _refuse_living(self.run, locked=self._descriptor is not None)
        except BaseException:
            self._unlock()
            raise
        self._before = _bytes_of(self.run.status) if in_passing else None
        self._writing = threading.Lock()
        self._said: dict[str, Any] = {}
        self._over, self._changed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def write(
        self, state: State, message: str = "", step: int | None = None, rank: int | None = None, **more: Any
    ) -> None:
        """RUN/status.json; while the state is `running`, its heartbeat is renewed from now on.

        Raises:
            StorageError: the file cannot be written.
        """
        with self._writing:
            self._said = {"state": state, "message": message, "step": step, "rank": rank, **more}
            self._write()
        if state == "running" and self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def reached(self, step: int, facts: Mapping[str, Any]) -> None:
        """The run has made `step` steps, and stands where the facts say; the file follows, without keeping the run waiting."""
        self._said = {**self._said, **facts, "step": step}
        self._changed.set()

    def release(self) -> None:
        """End of the run: another one may come."""
        self._over.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join()
        if self._before is not None:
            _put_back(self.run.status, self._before)
        self._unlock()

    def _beat(self) -> None:
        while not self._over.wait(min(SOON, BEAT)):
            self._changed.wait(BEAT - min(SOON, BEAT))
            self._changed.clear()
            if self._over.is_set():
                return
            with self._writing:
                if self._said["state"] != "running" or not self._is_ours():
                    return
                try:
                    self._write()
                except OSError:
                    continue  # a full disk is for the next checkpoint to report

    def _is_ours(self) -> bool:
        """Not where another rank has said meanwhile why it failed."""
        status = read_status(self.run) or {}
        return status.get("state") == "running" and status.get("pid") == os.getpid()

    def _write(self) -> None:
        write_status(self.run, **self._said, host=socket.gethostname(), pid=os.getpid(), heartbeat=_now())

    def _unlock(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        _HELD.discard(self.run.path.resolve())


def _bytes_of(file: Path) -> bytes:
    """Empty where there is none."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _put_back(file: Path, before: bytes) -> None:
    with suppress(OSError):
        write_text_atomic(file, before.decode()) if before else file.unlink(missing_ok=True)


_HELD: set[Path] = set()  # by this process, which its own lock does not keep out


def _locked(run: RunFolder) -> int | None:
    """The descriptor that holds the lock; None where the file system has no locks."""
    if run.path.resolve() in _HELD:
        raise _occupied(run, "this process", "choose another folder, or wait for its end")
    try:
        descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(
            f"run.output_dir is {str(run)!r}, whose {run.lock.name} cannot be opened ({error.strerror})"
        ) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _occupied(run, holder or "another process", "choose another folder, or wait for its end") from error
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _refuse_living(run: RunFolder, locked: bool) -> None:
    """A run on another host whose heartbeat is young; on this host the lock has told already, where there are locks."""
    status = read_status(run) or {}
    host, pid, age = status.get("host"), status.get("pid"), _age(status.get("heartbeat"))
    if status.get("state") != "running" or host is None or age is None or age > ALIVE:
        return
    if host == socket.gethostname() and (locked or pid == os.getpid() or not _is_alive(pid)):
        return
    raise _occupied(
        run,
        f"process {pid} on {host}, whose last sign of life is {max(0, round(age))} s old,",
        f"choose another folder, or wait for its end; if it is dead, delete {run.status}, or wait {ALIVE:.0f} s",
    )


def _occupied(run: RunFolder, holder: str, accepted: str) -> UsageError:
    return UsageError(f"run.output_dir is {str(run)!r}, where {holder} is at work; {accepted}")


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, TypeError, ValueError):
        return True
    return True


def _age(heartbeat: Any) -> float | None:
    """Seconds since then; a clock that is ahead counts by how far it is."""
    try:
        return abs(time.time() - datetime.fromisoformat(heartbeat).timestamp())
    except (TypeError, ValueError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
