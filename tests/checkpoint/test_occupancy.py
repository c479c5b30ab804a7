"""A run's folder has one run at a time, and a dead one does not keep it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.checkpoint import occupancy
from dist_subspace.checkpoint.occupancy import ALIVE, Occupancy
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.status import read_status, write_status
from tests.ranks import ROOT

HOLD = """
import os, sys, time
from dist_subspace.checkpoint.occupancy import Occupancy
held = Occupancy(sys.argv[1])
held.write("running", step=7)
if sys.argv[2] == "fork" and os.fork() == 0:  # a worker that outlives its parent
    time.sleep(60)
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def hold_elsewhere(run: Path, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), how], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_second_process_is_refused_and_changes_nothing_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    for how in ("alone", "fork"):
        process = hold_elsewhere(tmp_path, how)
        try:
            before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            said = rf"run.output_dir is .*, where process {process.pid} on .* is at work"
            with pytest.raises(UsageError, match=said):
                Occupancy(tmp_path)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
            process.kill()
            process.wait()
            assert (read_status(tmp_path) or {})["state"] == "running"  # as a killed run leaves it
            Occupancy(tmp_path).release()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_it_is_refused_within_a_process_too_and_given_back(tmp_path: Path) -> None:
    first = Occupancy(tmp_path)
    with pytest.raises(UsageError, match="this process is at work"):
        Occupancy(tmp_path)
    first.release()
    Occupancy(tmp_path).release()


def test_the_lock_names_its_holder_and_nothing_of_a_former_one(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 12345678 on a host with a long name\n")
    held = Occupancy(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    held.release()


def running(run: Path, **more: Any) -> None:
    known = {"host": "elsewhere", "pid": 1, "heartbeat": datetime.now(UTC).isoformat()}
    write_status(run, "running", "", 3, **known | more)


def test_a_young_heartbeat_of_another_host_is_refused_with_what_to_do(tmp_path: Path) -> None:
    running(tmp_path)
    with pytest.raises(UsageError, match=r"process 1 on elsewhere.* is at work; .*delete .*status.json"):
        Occupancy(tmp_path)
    assert (read_status(tmp_path) or {})["host"] == "elsewhere"
    old = datetime.now(UTC) - timedelta(seconds=ALIVE + 5)
    for more in ({"heartbeat": old.isoformat()}, {"heartbeat": "soon"}, {"host": None}, {"host": socket.gethostname()}):
        running(tmp_path, **more)
        Occupancy(tmp_path).release()
    ahead = datetime.now(UTC) + timedelta(seconds=ALIVE + 60)  # of a clock that is set so: it would be young for hours
    running(tmp_path, heartbeat=ahead.isoformat())
    Occupancy(tmp_path).release()
    write_status(tmp_path, "finished", host="elsewhere", pid=1, heartbeat=datetime.now(UTC).isoformat())
    Occupancy(tmp_path).release()


def test_without_locks_the_process_of_this_host_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(occupancy.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(occupancy.fcntl, "lockf", refuse)
    running(tmp_path, host=socket.gethostname(), pid=os.getppid())
    with pytest.raises(UsageError, match="is at work"):
        Occupancy(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid in (gone.pid, os.getpid()):
        running(tmp_path, host=socket.gethostname(), pid=pid)
        Occupancy(tmp_path).release()


def test_an_error_of_the_disk_while_it_is_locked_does_not_pass_for_a_disk_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(occupancy.errno.EIO, "Input/output error")

    monkeypatch.setattr(occupancy.fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        Occupancy(tmp_path)


def test_the_heartbeat_outlives_a_disk_that_refuses_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(occupancy, "BEAT", 0.02)
    monkeypatch.setattr(occupancy, "_now", lambda: str(time.monotonic()))
    held = Occupancy(tmp_path)
    held.write("running", step=3)
    (tmp_path / ".status.json.heartbeat.partial").mkdir()  # where it would be written
    time.sleep(0.3)
    (tmp_path / ".status.json.heartbeat.partial").rmdir()
    held.reached(4, {"total_steps": 9})
    until = time.monotonic() + 20
    while (read_status(tmp_path) or {})["step"] != 4 and time.monotonic() < until:
        time.sleep(0.02)
    held.release()
    assert (read_status(tmp_path) or {})["step"] == 4


def test_the_heartbeat_goes_on_with_the_step_until_the_state_or_another_rank_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(occupancy, "BEAT", 0.05)
    monkeypatch.setattr(occupancy, "_now", lambda: str(time.monotonic()))
    held = Occupancy(tmp_path)
    held.write("running", step=3)
    first = read_status(tmp_path) or {}
    held.reached(4, {"total_steps": 9})
    deadline = time.monotonic() + 20
    while (found := read_status(tmp_path) or {})["step"] != 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found["heartbeat"] != first["heartbeat"] and found["step"] == 4
    assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
    for _ in range(2):  # as another rank does, for a heartbeat may be on its way
        write_status(tmp_path, "failed", "out of memory", rank=1)
        time.sleep(0.2)
    assert (read_status(tmp_path) or {})["rank"] == 1
    held.write("failed", "out of memory", 4, 1)
    held.release()
    assert (read_status(tmp_path) or {})["state"] == "failed"


def test_the_status_follows_the_steps_and_not_the_heartbeat_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first within a second; many in a moment are one write."""
    monkeypatch.setattr(occupancy, "SOON", 0.3)
    held = Occupancy(tmp_path)
    held.write("running", step=0)
    began, writes, last = time.monotonic(), 0, None
    for step in range(1, 100):
        held.reached(step, {"total_steps": 99, "loss": 1.0 / step})
        found = read_status(tmp_path) or {}
        writes, last = writes + (found["step"] != last), found["step"]
        time.sleep(0.01)
    until = time.monotonic() + occupancy.BEAT / 2
    while (found := read_status(tmp_path) or {})["step"] != 99 and time.monotonic() < until:
        time.sleep(0.02)
    took = time.monotonic() - began
    held.release()
    assert (found["step"], found["total_steps"], found["loss"]) == (99, 99, 1.0 / 99)
    assert took < occupancy.BEAT / 2 and writes <= took / 0.3 + 2


def test_whoever_comes_in_passing_leaves_the_status_as_it_was(tmp_path: Path) -> None:
    held = Occupancy(tmp_path, in_passing=True)
    held.write("running", step=0)
    held.release()
    assert not (tmp_path / "status.json").exists()
    write_status(tmp_path, "finished", step=7)
    before = (tmp_path / "status.json").read_bytes()
    held = Occupancy(tmp_path, in_passing=True)
    held.write("running", step=0)
    held.write("refused", "for a reason")
    held.release()
    assert (tmp_path / "status.json").read_bytes() == before
