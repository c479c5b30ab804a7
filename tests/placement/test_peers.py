"""What a rank tells the others before it leaves, and how long it waits for them to hear it."""

from __future__ import annotations

import time

import torch

from dist_subspace.placement.peers import Peers
from dist_subspace.stopping import Stop


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
