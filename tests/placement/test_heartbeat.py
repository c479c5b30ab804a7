"""Who was lost is found out beside the collectives, also where the store keeps who asks: real stores, processes and servers."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from dist_subspace.placement.heartbeat import silent_after
from tests.ranks import ROOT, free_port


@pytest.mark.parametrize(("timeout", "seconds"), [(300.0, 240.0), (10.0, 4.0), (30.0, 24.0), (None, math.inf)])
def test_most_of_the_timeout_is_waited_and_the_rest_is_kept_for_the_last_words(timeout: Any, seconds: float) -> None:
    assert silent_after(timeout) == pytest.approx(seconds)


# One rank of two, in a process of its own: the other one is a name in the store.
RANK = """
import json, sys, time
from dataclasses import asdict, replace
from datetime import timedelta
import torch.distributed as dist
from dist_subspace.placement.heartbeat import Heartbeat
from dist_subspace.placement.peer import Peer
from dist_subspace.placement.peers import Peers
from dist_subspace.stopping import listening

port, other = int(sys.argv[1]), json.loads(sys.argv[2])
store = dist.PrefixStore("group", dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=600)))
with listening() as stop:
    peers = Peers(store, 1, 2, stop)
    store.set(f"{peers.prefix}/beat/0", "0")
    store.set(f"{peers.prefix}/peer/0", json.dumps(asdict(replace(Peer.of_this_process(0), **other))))

    def last_words(loss):
        print(json.dumps({"gone": [peer.rank for peer in loss.gone], "store": loss.store, "silent": loss.silent}), flush=True)
        return 7

    heartbeat = Heartbeat(peers, last_words)
    heartbeat.allow(float(sys.argv[3]) or None)
    with heartbeat.beating(stop):
        print("beating", flush=True)
        if sys.argv[4] == "bye":
            store.set(f"{peers.prefix}/bye/0", "1")
        time.sleep(float(sys.argv[5]))
print("left", flush=True)
"""
STORE = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False, timeout=timedelta(seconds=600))
print("up", flush=True)
time.sleep(600)
"""


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline().strip() in ("up", "beating")
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, Any]:
    out, _ = process.communicate(timeout=60)
    said = out.splitlines()[-1]
    return process.returncode, json.loads(said) if said.startswith("{") else said


@pytest.fixture
def store() -> Any:
    port = free_port()
    process = started(STORE, port)
    yield port, process
    process.kill()
    process.wait()


ELSEWHERE = json.dumps({"machine": "another", "host": "node9", "address": "192.0.2.1"})


def test_a_rank_that_falls_silent_is_lost_and_who_is_left_says_so_and_leaves_with_that_status(store: Any) -> None:
    status, loss = ended(started(RANK, store[0], ELSEWHERE, 10, "-", 60))
    assert status == 7 and (loss["gone"], loss["store"]) == ([0], True) and loss["silent"] > 4.0


@pytest.mark.parametrize(("timeout", "other"), [(0, "-"), (10, "bye")])
def test_silence_is_no_loss_where_it_is_not_watched_or_the_rank_has_left_in_order(
    timeout: float, other: str, store: Any
) -> None:
    assert ended(started(RANK, store[0], ELSEWHERE, timeout, other, 9)) == (0, "left")


def test_a_store_that_keeps_who_asks_is_noticed_by_the_thread_that_waits_for_nobody(store: Any) -> None:
    """Its process is stopped: as from a host that has vanished, no answer comes, and no error either."""
    port, process = store
    rank = started(RANK, port, ELSEWHERE, 10, "-", 60)
    time.sleep(1.5)  # by now it knows who is there
    process.send_signal(signal.SIGSTOP)
    status, loss = ended(rank)
    assert status == 7 and (loss["gone"], loss["store"]) == ([0], False)
