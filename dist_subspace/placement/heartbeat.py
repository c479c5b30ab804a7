"""Signs of life beside the collectives, in which a rank whose neighbour has vanished would wait for many minutes and name nobody:
which rank, on which host, was lost, on every rank that is left.

One thread asks the store (`Peers.look`). It may itself be kept for minutes where the store's host has vanished, so the thread
that listens for signals, which waits for nobody, watches it. Either one ends the process: the main thread is inside a collective.

Margins. A rank is lost after four fifths of `training.rank_timeout`: 240 of 300 seconds, and not the few that would do, because a
thread of Python gives these signs, which one long call of a library that keeps the interpreter's lock, a machine that swaps or a
virtual one that is moved may hold up, and because links come back. A false alarm ends a run of weeks; a late one costs minutes.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dist_subspace.placement.peer import Peer
from dist_subspace.placement.peers import Peers
from dist_subspace.placement.reach import answering
from dist_subspace.placement.silence import Silence
from dist_subspace.stopping import Stop

BEFORE = 300.0  # seconds of training.rank_timeout until the configuration is read
_TICK = 0.25  # seconds between two looks
_LOOK = 2.0  # seconds that one look counts for at most
_TO_LEAVE, _SHARE = 6.0, 0.2  # seconds, and share, of the timeout that are kept for the last words
_ENDED = 60.0  # seconds that a rank has to leave by itself once the store has ended; its main thread has heard of it, as a rule
_BY_ITSELF = 15.0  # the same where a process of this machine has ended
_PROBE = 2.0  # seconds in which a host answers


@dataclass(frozen=True)
class Loss:
    """Who was lost, as far as this rank can tell.

    silent: seconds without a sign of life; 0 where processes have ended. answers: the hosts among theirs that answer. store:
    whether the key-value store answers. alone: whether it is rather this rank's own host that was cut off, since no other one
    answers.
    """

    gone: list[Peer]
    silent: float
    answers: frozenset[str]
    store: bool
    alone: bool


def silent_after(timeout: float | None) -> float:
    """Seconds of silence after which a rank is lost, so that all have left within `timeout` seconds; None: never."""
    return math.inf if timeout is None else timeout - max(_TO_LEAVE, _SHARE * timeout)


class Heartbeat:
    """Gives this rank's signs of life and watches for those of the others, for as long as `beating` lasts.

    Arguments:
        last_words: says what was lost, and returns the exit status; called once, in a thread of its own that may be left behind
            (a disk may have gone with a host).
    """

    def __init__(self, peers: Peers, last_words: Callable[[Loss], int]) -> None:
        self.peers, self._last_words = peers, last_words
        self._over, self._ending = threading.Event(), threading.Lock()
        self._rounds = 0
        self._answer = Silence(_LOOK)
        self._ended = Silence(_LOOK)
        self._watched, self._pause = time.monotonic(), 0.0
        self.allow(BEFORE)

    def allow(self, timeout: float | None) -> None:
        """From now on: all ranks have left `timeout` seconds after one was lost; None: silence is no loss."""
        self.peers.silent_after = silent_after(timeout)
        self._to_leave = 15.0 if timeout is None else max(_TO_LEAVE, _SHARE * timeout)

    def was_paused(self) -> float:
        """Seconds for which this process itself did nothing, if the others have taken it for lost meanwhile; else 0."""
        pause = max(self._pause, time.monotonic() - self._watched)
        return pause if pause > self.peers.silent_after else 0.0

    @contextmanager
    def beating(self, stop: Stop) -> Iterator[None]:
        thread = threading.Thread(target=self._beat, name="heartbeat of this rank", daemon=True)
        thread.start()
        try:
            with stop.watching(self._watch):
                yield
        finally:
            self._over.set()
            thread.join(2.0)

    def _beat(self) -> None:
        while not self._over.wait(_TICK):
            self.peers.look()
            if not self.peers.store_is_lost:
                self._rounds += 1
                self._leave_without_lost()
        self.peers.leave()

    def _leave_without_lost(self) -> None:
        gone = [] if self.peers.told is not None else self.peers.gone()
        ended = [peer for peer in gone if self.peers.silence(peer) <= self.peers.silent_after]
        waited = self._ended.look(None if ended else object())
        if len(ended) < len(gone):
            time.sleep(
                min(2 * _LOOK, self.peers.silent_after / 8)
            )  # the others of that host fall silent a moment later
            silent = max(map(self.peers.silence, gone))
            self._leave(silent, self.peers.gone(silent - min(4 * _LOOK, self.peers.silent_after / 4)))
        elif waited > min(_BY_ITSELF, self.peers.silent_after):
            self._leave(0.0, ended)

    def _watch(self) -> None:
        """On the thread that waits for nobody."""
        now = time.monotonic()
        self._pause, self._watched = max(self._pause, now - self._watched), now
        self.peers.leave_if_told()
        if self.peers.told is not None:  # what is missed from now on has left
            return
        silent = self._answer.look(self._rounds)
        if silent > min(self.peers.silent_after, _ENDED if self.peers.store_is_lost else math.inf):
            self.peers.store_is_lost = True
            keeper = self.peers.known.get(0)
            there = [peer for peer in self.peers.known.values() if keeper and peer.machine == keeper.machine]
            self._leave(silent, sorted(there, key=lambda peer: peer.rank), store=False)

    def _leave(self, silent: float, gone: list[Peer], store: bool = True) -> None:
        if self._over.is_set() or not self._ending.acquire(blocking=False):
            return
        status = [1]

        def speak() -> None:
            status[0] = self._last_words(self._loss(silent, gone, store))

        speaking = threading.Thread(target=speak, daemon=True)
        speaking.start()
        speaking.join(self._to_leave)
        os._exit(status[0])

    def _loss(self, silent: float, gone: list[Peer], store: bool) -> Loss:
        """Asks the other hosts whether they answer, where a whole host may be lost."""
        others = {peer.address: peer for peer in self.peers.known.values() if not peer.is_here}
        asked = others if silent and others else {}
        found = {others[address].host for address in answering(asked, _PROBE)}
        out_of_sight = not store or all(peer in gone for peer in others.values())
        # Of two hosts each one loses the other: only a third tells which of them was cut off.
        alone = out_of_sight and not found and len({peer.machine for peer in others.values() if asked}) > 1
        if not gone and alone:  # rank 0 itself, whose own store is out of its reach
            gone = sorted(others.values(), key=lambda peer: peer.rank)
        return Loss(gone, silent, frozenset(found), store, alone)
