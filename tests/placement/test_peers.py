"""What a rank tells the others before it leaves, and how long it waits for them to hear it."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dist_subspace.placement.peers import Peers, join
from dist_subspace.stopping import Stop
from tests.forked_ranks import report, run_ranks
from tests.ranks import free_port


def test_who_has_said_why_the_run_ends_waits_for_those_who_have_not_heard_and_for_none_who_has_left() -> None:
    store = torch.distributed.HashStore()
    first, second = (Peers(store, rank, 2, Stop()) for rank in range(2))
    began = time.monotonic()
    first.tell(1, seconds=1.0)
    assert time.monotonic() - began >= 1.0, "nobody has heard it yet"
    second.leave()
    began = time.monotonic()
    first.tell(1, seconds=60.0)
    assert time.monotonic() - began < 30.0


def test_ranks_that_have_joined_know_each_other_before_a_sign_of_life_was_given(tmp_path: Path) -> None:
    """Who is killed in the first moment, and takes the store along, could not be named otherwise."""
    port = free_port()
    ended = run_ranks([(_join_late, port, rank, 3) for rank in range(3)], tmp_path)
    assert [rank.status for rank in ended] == [0] * 3, report(ended)
    assert ["1, 2" in ended[0].output, "0, 2" in ended[1].output, "0, 1" in ended[2].output] == [True] * 3, report(
        ended
    )


def _join_late(port: int, rank: int, size: int) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    time.sleep(0.3 * rank)
    peers = join(Stop())
    assert peers is not None
    print(", ".join(map(str, sorted(peers.known))))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
