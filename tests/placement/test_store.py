"""Ranks that torchrun starts again meet in the store of those before them, and not these."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_subspace.placement.collectives import gather_objects
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.placement.store import attempt, is_kept
from tests.forked import forked
from tests.ranks import free_port, rank_environment

KEPT = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    ("variables", "kept", "number"),
    [
        (KEPT | {"TORCHELASTIC_RESTART_COUNT": "2"}, True, "2"),
        (KEPT | {"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": "2"}, False, "0"),
        ({}, False, "0"),
    ],
)
def test_attempts_are_told_apart_where_the_store_is_kept(variables: dict[str, str], kept: bool, number: str) -> None:
    """Elsewhere each attempt has a store of its own, and the agents' counts may differ."""
    assert (is_kept(variables), attempt(variables)) == (kept, number)


ATTEMPTS = 7  # which side of a pair connects depends on the ports: half of all ranks find out that an address is old


def be_a_rank(rank: int, port: int, number: int, pipe: Connection) -> None:
    os.environ.update(rank_environment(rank, 2, port) | KEPT | {"TORCHELASTIC_RESTART_COUNT": str(number)})
    if rank == 0 and number:  # later than rank 1, which finds an address there
        make: Any = dist.init_process_group

        def late(*args: Any, **given: Any) -> None:
            time.sleep(1.0)
            make(*args, **given)

        torch.distributed.init_process_group = late
    try:
        ensure_process_group()
        pipe.send(gather_objects(rank))
    except Exception as error:
        pipe.send(repr(error))
    os._exit(0)


def test_ranks_that_are_started_again_do_not_look_for_those_before_them() -> None:
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    for number in range(ATTEMPTS):
        ranks = []
        for rank in (0, 1):
            pipe, far_end = Pipe()
            ranks.append((forked(be_a_rank, rank, port, number, far_end), pipe))
        said = [pipe.recv() if pipe.poll(180) else None for _, pipe in ranks]
        for process, _ in ranks:
            process.kill()
            process.join()
        assert said == [[0, 1], [0, 1]], said
    del store
