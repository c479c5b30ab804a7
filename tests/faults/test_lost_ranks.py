"""A rank that is lost while the others wait for it in a collective is named, on the screen and in status.json, within
training.rank_timeout; and what a rank says goes into its own log. Real processes of one machine; hosts are in tests/cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.run_folder.local import local_folder
from dist_subspace.run_folder.status import read_status
from tests.faults import decisions
from tests.faults.scenes import Home
from tests.forked_ranks import Ended, report, side_by_side

TIMEOUT = 16.0  # seconds, of training.rank_timeout
FROZEN = 30.0  # seconds that a rank is stopped for


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("lost"))


def log_of(home: Home, run: str, rank: int) -> str:
    folder = local_folder(str(home.folder / "local"), home.folder / run)
    return folder.log(rank).read_text()


def go(home: Home, run: str, before: dict[int, Any], *overrides: str, **how: Any) -> list[Ended]:
    timeout = f"training.rank_timeout={TIMEOUT}"
    return home.run("long", run, timeout, f"run.local_dir={home.folder / 'local'}", *overrides, before=before, **how)


def stops(metrics: str, seconds: float) -> None:
    """This rank is stopped once the run has made a step, for so many seconds."""
    order = f"kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}"
    decisions.once_there(Path(metrics), lambda: subprocess.Popen(["sh", "-c", order]))


@pytest.fixture(scope="module")
def waited(home: Home) -> dict[str, list[Ended]]:
    """How the ranks of three runs ended, which waited side by side: for a rank that is stopped in a step, for one that is
    stopped before a checkpoint, and for one that hangs."""
    metrics = str(home.folder / "stopped" / "metrics.jsonl")
    stopped, met, hung = side_by_side(
        lambda: go(home, "stopped", {1: (stops, metrics, FROZEN)}),
        lambda: go(home, "met", {1: (stops_before_a_checkpoint,)}, limit=40.0),
        lambda: go(home, "hangs", {rank: (hangs, rank == 1) for rank in (0, 1)}, "training.rank_timeout=12"),
    )
    return {"stopped": stopped, "met": met, "hangs": hung}


def test_a_rank_that_is_stopped_is_named_in_time_and_leaves_too_when_it_wakes_up(
    home: Home, waited: dict[str, list[Ended]]
) -> None:
    ended = waited["stopped"]
    assert [rank.status for rank in ended] == [1, 1], report(ended)
    status = read_status(home.folder / "stopped")
    assert status is not None and (status["state"], status["rank"]) == ("failed", 1), report(ended)
    assert status["rank_host"] == os.uname().nodename
    said, waking = (rank.errors for rank in ended)
    assert said[-1].startswith("error: rank 1 (process ") and "was stopped (SIGSTOP)" in said[-1], report(ended)
    assert said[-1] == ended[0].output.splitlines()[-1] == f"error: {status['message']}"
    assert ended[0].seconds < ended[1].seconds - (FROZEN - TIMEOUT) + 2, "within the timeout"
    assert len(waking) == 1 and "rank 1 on " in waking[0] and "the others have left" in waking[0], report(ended)


def stops_before_a_checkpoint() -> None:
    """This rank is stopped for good when rank 0 is about to write one, and waits for it in no collective."""
    from dist_subspace.placement import collectives

    meet = collectives.meet

    def stop_first() -> None:
        if any(frame.name == "save_checkpoint" for frame in traceback.extract_stack()):
            os.kill(os.getpid(), signal.SIGSTOP)
        meet()

    collectives.meet = stop_first


def test_a_rank_that_is_stopped_where_it_is_met_is_named_alike(home: Home, waited: dict[str, list[Ended]]) -> None:
    ended = waited["met"]
    status = read_status(home.folder / "met")
    assert ended[0].status == 1 and status is not None and status["rank"] == 1, report(ended)
    assert "was stopped (SIGSTOP)" in status["message"], report(ended)


def test_a_rank_that_is_stopped_for_a_moment_does_no_harm(home: Home) -> None:
    run = home.folder / "moment"
    ended = go(home, "moment", {1: (stops, str(run / "metrics.jsonl"), 4.0)}, "training.max_steps=60")
    assert [rank.status for rank in ended] == [0, 0], report(ended)
    assert read_status(run)["state"] == "finished"  # type: ignore[index]


def hangs(hanging: bool) -> None:
    """Collectives of seconds; this rank, if it is the one, never comes to those of its second step."""
    import deepspeed.constants

    deepspeed.constants.default_pg_timeout = timedelta(seconds=1)
    in_the_second_step(lambda: reads_from_a_dead_disk() if hanging else None)


def reads_from_a_dead_disk() -> None:
    time.sleep(3600)


def test_a_rank_that_lives_and_does_not_come_is_named_with_what_it_does_instead(
    home: Home, waited: dict[str, list[Ended]]
) -> None:
    ended = waited["hangs"]
    assert [rank.status for rank in ended] == [1, 1], report(ended)
    status = read_status(home.folder / "hangs")
    assert status is not None and (status["state"], status["rank"]) == ("failed", 1), report(ended)
    assert "rank 1 (process " in status["message"] and "(reads_from_a_dead_disk)" in status["message"]
    assert [line for rank in ended for line in rank.errors] == [f"error: {status['message']}"], report(ended)


def in_the_second_step(act: Callable[[], object]) -> None:
    from dist_subspace.training.engine import Stepper

    accumulate, steps = Stepper.accumulate, []

    def wrapped(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            act()
        return accumulate(*args)

    Stepper.accumulate = wrapped  # type: ignore[method-assign]


def shouts(then: str) -> None:
    """In its second step this rank writes by a C library and by a child process, and then fails, or is killed."""
    in_the_second_step(lambda: _shout(then))


def _shout(then: str) -> None:
    os.write(2, b"a library's line\n")
    subprocess.run([sys.executable, "-c", "print('a child process')"], check=True)
    print("\n".join(f"line {number}" for number in range(300)))
    if then == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("this rank's own fault")


@pytest.mark.parametrize("then", ["raise", "kill"])
def test_what_a_failing_rank_said_is_in_its_own_log_and_the_end_of_it_in_the_run_s_folder(
    then: str, home: Home
) -> None:
    run = home.folder / f"logs-{then}"
    ended = go(home, run.name, {1: (shouts, then)})
    assert [rank.status for rank in ended] == [1, 1 if then == "raise" else -signal.SIGKILL], report(ended)
    log = log_of(home, run.name, 1)
    assert log.startswith("=== ") and "rank 1 of 2, process " in log.splitlines()[0]
    assert {"a library's line", "a child process", "line 0", "line 299"} <= set(log.splitlines())
    assert ("this rank's own fault" in log and "Traceback" in log) == (then == "raise")
    kept = (run / "logs" / "rank-1.log").read_text()
    assert len(kept.splitlines()) == 200 and log.endswith(kept)
    assert "line 299" not in ended[1].output, "it is not on the screen"
    speaker = ended[1] if then == "raise" else ended[0]
    sentence = speaker.output.splitlines()[-1]
    assert sentence.startswith("error: rank 1 "), report(ended)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["rank"], f"error: {status['message']}") == ("failed", 1, sentence)
    assert status["rank_host"] == os.uname().nodename and len(speaker.errors) == 1
    assert "Connection" not in ended[0].output and "Traceback" not in ended[0].output, report(ended)


def test_the_traceback_of_rank_0_is_on_its_screen_and_in_the_run_s_folder(home: Home) -> None:
    run = home.folder / "first"
    ended = go(home, "first", {0: (shouts, "raise")})
    assert [rank.status for rank in ended] == [1, 1], report(ended)
    assert "line 299" in ended[0].output and ended[0].output.splitlines()[-1].startswith("error: rank 0 on ")
    assert "this rank's own fault" in (run / "logs" / "rank-0.log").read_text()
    assert ended[1].errors == [] and "Traceback" not in ended[1].output, report(ended)


def test_where_a_run_is_stands_in_two_lines_at_its_start(home: Home) -> None:
    ended = go(home, "where", {}, "training.max_steps=1")
    assert [rank.status for rank in ended] == [0, 0], report(ended)
    host = os.uname().nodename
    first, second = (line for line in ended[0].output.splitlines() if "ranks on" in line or "run folder" in line)
    assert first == f"2 ranks on 1 node, 2 on {host} (cpu), started by RANK and WORLD_SIZE, over gloo"
    assert second.startswith(f"weights fp32, preset zero0; run folder {home.folder / 'where'}, other ranks' logs ")
    assert "ranks on" not in ended[1].output
