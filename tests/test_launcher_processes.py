"""A launcher that ends is noticed by those that it started, and by nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_subspace.launcher_processes import Launcher, parent_of
from tests.ranks import ROOT, free_port

CHILD = """
import time
from dist_subspace.launcher_processes import Launcher
launcher = Launcher()
print("started", flush=True)
for _ in range(100):
    if launcher.gone():
        break
    time.sleep(0.05)
open({answer!r}, "w").write(str(launcher.gone()))
"""
STARTER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"


def answer_after_the_starter_is_killed(folder: Path, starter: list[str], marks: dict[str, str]) -> str:
    """`starter` starts the child, and is killed once that runs."""
    answer = folder / "answer"
    child = CHILD.format(answer=str(answer))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
    }
    process = subprocess.Popen(
        [*starter, child], stdout=subprocess.PIPE, env=environment | {"PYTHONPATH": str(ROOT)} | marks, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while not (answer.exists() and answer.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer.read_text()


@pytest.mark.parametrize(
    ("marks", "gone"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, "True"),
        ({"CROSS_RANK": "0", "LOCAL_SIZE": "2"}, "True"),
        ({}, "False"),  # nohup, setsid, `&` in a shell that ends
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, "False"),  # ranks that a script started one by one
    ],
)
def test_the_end_of_the_starter_counts_where_it_was_a_launcher(
    marks: dict[str, str], gone: str, tmp_path: Path
) -> None:
    assert answer_after_the_starter_is_killed(tmp_path, [sys.executable, "-c", STARTER], marks) == gone


@pytest.mark.parametrize(("command", "gone"), [("deepspeed", "True"), ("my-own-shell", "False")])
def test_the_end_of_the_deepspeed_command_counts_though_the_process_below_it_goes_on(
    command: str, gone: str, tmp_path: Path
) -> None:
    program = tmp_path / command
    program.write_text(
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STARTER!r}, sys.argv[1]]).wait()"
    )
    marks = {"CROSS_RANK": "0", "LOCAL_SIZE": "2"}
    assert answer_after_the_starter_is_killed(tmp_path, [sys.executable, str(program)], marks) == gone


def test_this_process_has_a_parent_and_one_that_is_not_there_has_none() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) is None
    assert not Launcher().gone()


def test_of_the_ranks_that_are_told_to_stop_while_they_import_the_first_speaks(tmp_path: Path) -> None:
    ranks = []
    for rank in ("0", "1"):
        surroundings = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
        surroundings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, str(ROOT / "launch" / "train.py"), str(tmp_path / "config.yaml")]
        ranks.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=surroundings, text=True)
        )
    assert ranks[0].stdout is not None and ranks[0].stdout.readline().startswith("starting: ")
    time.sleep(1.0)
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    first, second = (process.communicate(timeout=120)[0] for process in ranks)
    assert first == "interrupted by signal SIGTERM while starting; run the same command to continue\n" and second == ""
    assert ranks[0].returncode == 75
