"""RUN/environment.json says with what a run was made, at each of its starts, and no secret."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dist_subspace.run_folder import RunFolder
from dist_subspace.training.environment import gather_environment, write_environment


def test_versions_hardware_and_command_line_are_those_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    run = RunFolder(tmp_path)
    write_environment(run, gather_environment(0))
    found = json.loads(run.environment.read_text())
    assert found["python"] == platform.python_version() and found["packages"]["torch"] == metadata.version("torch")
    assert sys.orig_argv[-1] in found["command"] and found["working_folder"] == os.getcwd()
    assert found["ranks"] == 1 and sum(found["hosts"].values()) == 1 and sum(found["devices"].values()) == 1
    assert found["memory_bytes"] > 2**28 and all(cpu for cpu in found["cpus"].values())
    assert found["variables"]["NCCL_DEBUG"] == "WARN" and "secret" not in run.environment.read_text()
    assert len(found["dist_subspace"]["files"]) == 12 and found["step"] == 0 and found["earlier"] == []


def test_every_start_of_a_run_is_kept_the_newest_first_and_a_damaged_file_is_no_hindrance(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (0, 7, 9):
        write_environment(run, {**gather_environment(step), "ranks": step + 1})
    found = json.loads(run.environment.read_text())
    assert (found["step"], found["ranks"]) == (9, 10)
    assert [(start["step"], start["ranks"]) for start in found["earlier"]] == [(7, 8), (0, 1)]
    assert all("earlier" not in start for start in found["earlier"])
    run.environment.write_text("[half")
    write_environment(run, gather_environment(11))
    assert json.loads(run.environment.read_text())["earlier"] == []
