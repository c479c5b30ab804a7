"""A rank's own log: what is moved there, how long it gets, and what is read back. The whole of it is in tests/faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.run_folder import RunFolder
from dist_subspace.run_folder.local import LocalFolder
from dist_subspace.training import rank_logs
from dist_subspace.training.rank_logs import LINES, RankLog, keep_last_lines, last_lines

SAYS = """
import os, sys, time
from pathlib import Path
from dist_subspace.run_folder.local import LocalFolder
from dist_subspace.training import rank_logs
rank_logs._LARGE, rank_logs._LOOK = 1000, 0.05
print("before")
log = rank_logs.RankLog(LocalFolder(sys.argv[1]), 3, "=== an attempt\\n", eval(sys.argv[2]))
print("said")
os.write(2, b"an error\\n")
print("the last word", file=log.screen)
if len(sys.argv) > 3:
    for _ in range(30):
        print("x" * 99)
        time.sleep(0.02)
"""


def says(folder: Path, descriptors: str = "(1, 2)", *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SAYS, str(folder), descriptors, *more]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def test_what_is_said_goes_into_the_log_and_only_the_last_word_onto_the_screen(tmp_path: Path) -> None:
    done, log = says(tmp_path / "run"), LocalFolder(tmp_path / "run").log(3)
    assert (done.stdout, done.stderr) == ("before\n", "the last word\n")
    assert log.read_text() == "=== an attempt\nsaid\nan error\n" and log.stat().st_mode & 0o777 == 0o600
    done = says(tmp_path / "run", "(2,)")
    assert (done.stdout, done.stderr) == ("before\nsaid\n", "the last word\n")
    assert log.read_text() == "=== an attempt\nsaid\nan error\n=== an attempt\nan error\n", (
        "the first attempt's is kept"
    )


def test_a_log_does_not_grow_without_an_end(tmp_path: Path) -> None:
    says(tmp_path / "run", "(1, 2)", "much")
    log = LocalFolder(tmp_path / "run").log(3)
    earlier = log.with_name("rank-3.log.1")
    assert earlier.stat().st_size + log.stat().st_size < 3000
    log.write_text("y" * 1001)
    says(tmp_path / "run")
    assert earlier.read_text() == "y" * 1001 and log.read_text().startswith("=== an attempt")


def test_a_log_that_cannot_be_written_is_refused_and_nothing_is_moved(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"run\.local_dir means on "):
        RankLog(LocalFolder(tmp_path / "file" / "run"), 1, "")
    (tmp_path / "run" / "logs" / "rank-1.log").mkdir(parents=True)
    with pytest.raises(UsageError, match="rank 1 cannot write its log"):
        RankLog(LocalFolder(tmp_path / "run"), 1, "")


def test_the_last_lines_of_a_log_are_kept_in_the_run_s_folder(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(1000)))
    kept = last_lines(log)
    assert kept.splitlines() == [f"line {number}" for number in range(1000 - LINES, 1000)]
    keep_last_lines(RunFolder(tmp_path / "run"), 2, kept)
    assert (tmp_path / "run" / "logs" / "rank-2.log").read_text() == kept
    log.write_text("one line without an end " * 100_000)
    assert 0 < len(last_lines(log)) <= rank_logs._BYTES
