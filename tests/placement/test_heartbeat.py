"""Who was lost is found out beside the collectives, also where the store keeps who asks: real stores, processes and signals."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.distributed as dist

from dist_subspace.placement.heartbeat import Heartbeat, Loss, silent_after
from dist_subspace.placement.peer import Peer
from dist_subspace.placement.peers import Peers
from dist_subspace.stopping import Stop, listening
from tests.forked import forked
from tests.ranks import free_port

ELSEWHERE = {"machine": "another", "host": "node9", "address": "192.0.2.1"}
LEFT = 7  # the exit status of last words


@pytest.mark.parametrize(("timeout", "seconds"), [(300.0, 240.0), (10.0, 4.0), (30.0, 24.0), (None, math.inf)])
def test_most_of_the_timeout_is_waited_and_the_rest_is_kept_for_the_last_words(timeout: Any, seconds: float) -> None:
    assert silent_after(timeout) == pytest.approx(seconds)


def keep_store(port: int, pipe: Connection) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=600))
    pipe.send("up")
    time.sleep(600)
    del store


def be_rank_1(
    port: int, pipe: Connection, other: dict[str, str], timeout: float | None, bye: bool, lasts: float
) -> None:
    """Rank 1 of two; rank 0 is a name in the store, with one sign of life."""
    store: Any = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=600))
    store = dist.PrefixStore("group", store)

    def last_words(loss: Loss) -> int:
        pipe.send(([peer.rank for peer in loss.gone], loss.store, loss.silent))
        return LEFT

    with listening() as stop:
        peers = Peers(store, 1, 2, stop)
        store.set(f"{peers.prefix}/beat/0", "0")
        store.set(f"{peers.prefix}/peer/0", json.dumps(asdict(replace(Peer.of_this_process(0), **other))))
        heartbeat = Heartbeat(peers, last_words)
        heartbeat.allow(timeout)
        with heartbeat.beating(stop):
            deadline = time.monotonic() + 30
            while not peers.known and time.monotonic() < deadline:
                time.sleep(0.05)
            pipe.send(heartbeat.was_paused())
            if bye:
                store.set(f"{peers.prefix}/bye/0", "1")
            time.sleep(lasts)
            pipe.send(("left in order", heartbeat.was_paused()))
    os._exit(0)


@contextmanager
def started(function: Any, port: int, *arguments: Any) -> Iterator[tuple[Any, Connection]]:
    """The process, once it says that it is at work."""
    pipe, far_end = Pipe()
    process = forked(function, port, far_end, *arguments)
    far_end.close()
    try:
        assert pipe.poll(300), "the imports of the first process count"
        pipe.recv()
        yield process, pipe
    finally:
        process.kill()
        process.join()


@pytest.fixture
def store() -> Iterator[tuple[int, Any]]:
    port = free_port()
    with started(keep_store, port) as (process, _):
        yield port, process


def ended(process: Any, pipe: Connection) -> tuple[int | None, Any]:
    said = pipe.recv() if pipe.poll(40) else None
    process.join(20)
    return process.exitcode, said


def test_a_rank_that_falls_silent_is_lost_and_who_is_left_says_so_and_leaves_with_that_status(store: Any) -> None:
    with started(be_rank_1, store[0], ELSEWHERE, 10.0, False, 60.0) as rank:
        status, (gone, answers, silent) = ended(*rank)
        assert (status, gone, answers) == (LEFT, [0], True) and 4.0 < silent < 10.0


@pytest.mark.parametrize(("timeout", "bye"), [(None, False), (10.0, True)])
def test_silence_is_no_loss_where_it_is_not_watched_or_the_rank_has_left_in_order(
    timeout: float | None, bye: bool, store: Any
) -> None:
    with started(be_rank_1, store[0], ELSEWHERE, timeout, bye, 8.0) as rank:
        assert ended(*rank) == (0, ("left in order", 0.0))


def test_a_store_that_keeps_who_asks_is_noticed_by_the_thread_that_waits_for_nobody(store: Any) -> None:
    """Its process is stopped: as from a host that has vanished, no answer comes, and no error either."""
    port, process = store
    with started(be_rank_1, port, ELSEWHERE, 10.0, False, 60.0) as rank:
        os.kill(process.pid, signal.SIGSTOP)
        status, (gone, answers, silent) = ended(*rank)
        assert (status, gone, answers) == (LEFT, [0], False) and silent > 4.0


def test_who_was_paused_itself_blames_nobody_and_knows_it(store: Any) -> None:
    """The rank is stopped for longer than the others may be silent; rank 0 has left in order, so that it stays to say so."""
    with started(be_rank_1, store[0], ELSEWHERE, 10.0, True, 3.0) as (process, pipe):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(6.0)
        os.kill(process.pid, signal.SIGCONT)
        status, (said, paused) = ended(process, pipe)
        assert (status, said) == (0, "left in order") and 4.0 < paused < 30.0


def test_where_a_main_thread_is_is_told_when_it_is_asked_for_and_not_before() -> None:
    """Python gives the frames of a running thread at a cost: torch's functions fail there now and then."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    asked, asks = Peers(store, 0, 2, Stop()), Peers(store, 1, 2, Stop())
    asked.look()
    assert store.get(f"{asked.prefix}/beat/0").decode().split()[1:] == []
    asks.look()
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            asked.look()

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        found = asks.elsewhere()
    finally:
        over.set()
        beating.join()
    assert [peer.rank for peer in found] == [0] and "peers.py" in next(iter(found.values()))
