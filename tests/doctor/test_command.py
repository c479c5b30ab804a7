"""The command in real processes: alone, by torchrun, as the deepspeed launcher starts it, and where packages are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_subspace.doctor import arguments, examination
from dist_subspace.doctor.examination import guarded
from tests.ranks import ROOT, free_port, outside_ranks

TIMEOUT = 240


def environment(**changes: str) -> dict[str, str]:
    fixed = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "COLUMNS": "200",
    }  # lines are not broken at the width of whoever runs the tests
    return outside_ranks() | fixed | changes


def run(command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=TIMEOUT, env=environment(**changes)
    )


def start_ranks(size: int, ranks: list[int], *options: str, **changes: str) -> list[subprocess.Popen[str]]:
    """By hand; `--local_rank=N` stands where the deepspeed launcher puts it."""
    meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "dist_subspace", f"--local_rank={rank}", "doctor", *options],
            env=environment(**meeting, RANK=str(rank), LOCAL_RANK=str(rank), **changes),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            text=True,
        )
        for rank in ranks
    ]


def test_two_healthy_ranks_print_one_table_and_both_leave_with_0() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dist_subspace"]
    done = run([*torchrun, "doctor", "--json", "--patience", "150"], GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)  # nothing else is printed there
    assert told["healthy"] and told["answered"] == [0, 1] and len(told["nodes"]) == 1
    rows = {row["what"] for row in told["table"]}
    assert {
        "packages",
        "device of a rank",
        "pack, forward, backward",
        "card",
        "all-reduce, gloo, 2 ranks",
        "Hub",
    } <= rows
    group = told["facts"]["0"]["traffic"]["group"]
    assert group["all_reduce"]["bandwidth"] > 0 and group["all_gather"]["latency"] > 0


def test_a_rank_that_never_starts_is_named_and_the_other_is_examined_and_leaves_with_1() -> None:
    """Of three hosts two leave so: tests/cluster/test_doctor.py."""
    (first,) = start_ranks(2, [0], "--patience", "5")
    out, errors = first.communicate(timeout=TIMEOUT)
    assert first.returncode == 1, out + errors
    assert "  1. rank 1: rank 1 of 2 did not answer in 5 seconds" in out and "--patience waits longer" in out
    assert "all-reduce, gloo, 1 rank" in out


def test_packages_that_are_missing_are_findings_of_the_doctor_itself(tmp_path: Path) -> None:
    """Even one that the command line needs, and the table; nothing is a traceback."""
    blocked = "import sys\nfor name in ('typer', 'rich', 'bitsandbytes'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    done = run(["-m", "dist_subspace", "doctor"], PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    for name in ("typer", "rich", "bitsandbytes"):
        assert f"{name} " in done.stdout.partition("What will break")[2]


def test_an_environment_that_contradicts_itself_is_one_sentence() -> None:
    done = run(["-m", "dist_subspace", "doctor"], RANK="3", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: rank 3 of 2 by the variables of RANK and WORLD_SIZE; accepted: ranks from 0 to 1\n"


def test_an_examination_that_raises_or_hangs_is_told_and_left() -> None:
    import time

    def fail() -> None:
        raise OSError("no such\ndevice")

    assert guarded(fail, limit=10) == {"failed": "OSError: no such"}
    assert guarded(time.sleep, 30, limit=0.2) == {"failed": "it was not done after 0.2 seconds"}
    assert guarded(len, "abc", limit=10) == 3 and examination.LIMIT > 0


def test_what_libraries_write_does_not_come_between() -> None:
    script = (
        "import os, sys\nfrom dist_subspace.doctor import screen\n"
        "with screen.to_itself() as (out, errors):\n"
        "    print('python'), print('error', file=sys.stderr), os.system('echo program; echo error >&2')\n"
        "    print('ours', file=out), print('our error', file=errors)\n"
        "print('after')\n"
    )
    done = run(["-c", script])
    assert (done.stdout, done.stderr) == ("ours\nafter\n", "our error\n")


def test_the_small_command_line_takes_what_the_large_one_takes() -> None:
    from typer.testing import CliRunner

    from dist_subspace import cli

    shown = CliRunner().invoke(cli.app, ["doctor", "--help"], env={"COLUMNS": "200"}).output
    assert "--json" in shown and "--patience" in shown and "config" in shown.lower()
    with pytest.raises(SystemExit):
        arguments.main(["--help"])
