"""Ranks that wait for one that works wait as long as it takes, and notice when it is gone."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_subspace.placement.collectives import PeerFailed, gather_objects, known_peers, on_main, once_per_node, world
from dist_subspace.placement.peers import join
from dist_subspace.placement.process_group import allow_collectives
from dist_subspace.stopping import STOP
from tests.ranks import free_port, run_once_on_ranks

TIMEOUT = 3.0  # seconds, of every collective


def with_short_timeout(port: int) -> None:
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))


def long_work(port: int) -> list[int]:
    with_short_timeout(port)
    once_per_node(time.sleep, 2 * TIMEOUT)
    assert on_main(lambda: time.sleep(2 * TIMEOUT) or 7) == 7
    return gather_objects(world().rank)


def test_work_of_one_rank_may_take_longer_than_a_collective_may() -> None:
    reports = run_once_on_ranks(2, long_work, free_port())
    assert [report.result for report in reports] == [[0, 1]] * 2, "\n".join(map(str, reports))
    assert not any("waitForInput" in report.output for report in reports), (
        "the store says nothing while it is waited at"
    )


def killed_at_work(port: int, rank: int) -> tuple[str, float]:
    """Rank 0 works for all; `rank`, the one that works or one that waits, is killed."""
    with_short_timeout(port)
    began = time.monotonic()

    def work() -> None:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    peers = join(STOP)
    assert peers is not None
    gather_objects(0)  # all have joined
    peers.look()
    gather_objects(0)  # and all know of all
    with known_peers(peers):
        try:
            if rank == world().rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            on_main(work)
        except PeerFailed as error:
            return str(error), time.monotonic() - began
    return "nothing", time.monotonic() - began


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_is_named_by_those_that_wait_for_it(rank: int) -> None:
    """Rank 0 also keeps the store that the others wait at."""
    reports = run_once_on_ranks(2, killed_at_work, free_port(), rank)
    assert reports[rank].exit_status == -signal.SIGKILL
    message, seconds = reports[1 - rank].result
    assert message.startswith(f"rank {rank} (process ") and seconds < 20


def timeouts_of_collectives(port: int) -> tuple[float, float]:
    """A collective that one rank comes to late, and the timeout that a patient run gives it."""
    with_short_timeout(port)
    allow_collectives(10.0)  # no less than what DeepSpeed's own would be
    time.sleep(2 * TIMEOUT * world().rank)
    assert gather_objects(world().rank) == [0, 1]
    began = timeout_of_group()
    allow_collectives(3600.0)
    return began, timeout_of_group()


def timeout_of_group() -> float:
    group: Any = dist.group.WORLD
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def test_a_collective_waits_longer_than_a_rank_may_be_silent() -> None:
    """Else it ends the run without a name before the heartbeat can say who was lost."""
    for report in run_once_on_ranks(2, timeouts_of_collectives, free_port()):
        assert report.good, report
        first, patient = report.result
        assert first >= 300.0 and patient == 7200.0
