"""The other ranks as processes: whether they live, and who was told to stop. Everything goes through the process group's
key-value store, so that no collective is needed, in which ranks wait for each other.

Local, but for `join`, which every rank calls. `look` is called now and then by a thread (heartbeat.py), with a store client of
its own. Whoever calls the store may wait for minutes where the host that has it has vanished.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from dist_subspace.placement.main_thread import WAITS, where_main_thread_is
from dist_subspace.placement.peer import Peer
from dist_subspace.placement.silence import Silence
from dist_subspace.stopping import Stop

_BEAT = 2.0  # seconds between two signs of life
_PER_RANK = 0.02  # seconds more between two looks at them, for each rank: all ask one store
_STOP_LOOK = 0.5  # seconds between two looks for a stop that another rank was told
_LEAVING = 15.0  # seconds that a rank has to leave by itself once another one has said why the run ends
_LOOK_AROUND = 0.1  # seconds between two looks for where the others are
_BROKEN = 10.0  # seconds of silence that name the rank whose connections have broken just now
_TO_JOIN = 10.0  # seconds in which all ranks, which have met a moment before, have joined


class Peers:
    """The ranks of one run, seen from this one.

    silent_after: seconds without a sign of life, after which a rank is taken for lost; without an end where that is infinite.
    """

    def __init__(self, store: Any, rank: int, size: int, stop: Stop) -> None:
        self._store, self.rank, self._size, self._stop = store.clone(), rank, size, stop
        run = self._store.add(f"dist_subspace/runs/{rank}", 1)  # a process may make several runs one after another
        self.prefix = f"dist_subspace/run/{run}"
        self.silent_after = math.inf
        self.known: dict[int, Peer] = {}
        self._silences: dict[int, Silence] = {}
        self._places: dict[int, str] = {}
        self._reported: set[int] = set()
        self._listening = threading.Lock()
        self._beaten = self._looked = self._listened = 0.0
        self._said = self._asks = False
        self.store_is_lost = False  # it has ended with the process that had it, or is out of reach
        self.told: int | None = None  # the exit status of a rank that has said why the run ends
        self._told_at = 0.0
        self.hear: Callable[[], None] = lambda: (
            None
        )  # what rank 0 does with what it is told, before the teller may leave
        self.log_of: Callable[[int], str] = lambda rank: ""  # the last lines of a rank of this machine
        self._set(f"beat/{rank}", "0")  # who is known has a sign of life: the store waits for a key that is not there
        self._set(f"peer/{rank}", json.dumps(asdict(Peer.of_this_process(rank))))

    def know_all(self, seconds: float) -> None:
        """Wait until every rank is known, so many seconds at most: who is killed in a run's first moment is named, too, and may
        take the store with it, from which the others would have learned who it was."""
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):
            self._learn()
            while len(self.known) < self._size - 1 and time.monotonic() < deadline:
                time.sleep(0.01)
                self._learn()

    def look(self) -> None:
        """Give a sign of life, and listen for those of the others; pass a stop on, or hear of one, or of a failure. A store that
        has ended with its host has nothing to say."""
        now = time.monotonic()
        try:
            if now - self._beaten > min(_BEAT, self.silent_after / 8):
                self._beaten = now
                asked = not self._asks and self._has("where")
                self._set(f"beat/{self.rank}", f"{now} {where_main_thread_is() if asked else ''}")
            if self._stop.reason is not None and not self._said:
                self._said = True
                self._set(f"heard/{self.rank}", "1")
                self._set("stop", self._stop.reason)
            elif self._stop.reason is None and now - self._looked > _STOP_LOOK:
                self._looked = now
                if self._has("stop"):
                    self._stop.tell(self._get("stop").decode())
            if self.told is None and self._has("told"):
                self.told, self._told_at = int(self._get("told")), now
                self.hear()
                self._set(f"knows/{self.rank}", "1")
            self._learn()
            self._listen()
            self._report_ended()
        except RuntimeError:
            self.store_is_lost = True

    def leave_if_told(self) -> None:
        """End this process where another rank has said why the run ends: the main thread waits for a rank that is gone, where no
        connection breaks."""
        if self.told is not None and time.monotonic() - self._told_at > _LEAVING:
            os._exit(self.told)

    def tell(self, status: int, seconds: float, log: str = "", sentence: str = "") -> None:
        """This rank has said why the run ends, and leaves with this status: the others shall know, and not take it for one that
        was killed, before the store may end with this process. They have so many seconds to hear.

        Arguments:
            log: the last lines of this rank, for rank 0 to keep.
            sentence: what it has said on its screen.
        """
        self.told, self._told_at = status, math.inf  # its own: nobody else is waited for
        with suppress(RuntimeError):
            self._keep_log(self.rank, log)
            if sentence:
                self._set("said", json.dumps([self.rank, sentence]))
            self._set("told", str(status))
            deadline = time.monotonic() + seconds
            others = [rank for rank in range(self._size) if rank != self.rank]
            while time.monotonic() < deadline and not all(self._has_heard(rank) for rank in others):
                others = [rank for rank in others if rank not in {peer.rank for peer in self.gone()}]
                time.sleep(0.05)

    def leave(self) -> None:
        """The run is over for this rank: its end is no loss."""
        with suppress(RuntimeError):
            self._set(f"bye/{self.rank}", "1")

    def gone(self, silent_after: float | None = None) -> list[Peer]:
        """The ranks whose process has ended, or that have given no sign of life for long."""
        with suppress(RuntimeError):
            self._learn()
            self._listen()
        limit = self.silent_after if silent_after is None else silent_after
        gone = [peer for peer in self.known.values() if self._is_gone(peer, limit)]
        return sorted(gone, key=lambda peer: peer.rank)

    def gone_within(self, seconds: float) -> list[Peer]:
        """As `gone`, where a connection has just broken: the process at its other end may take a moment to end, and one on
        another machine to be missed. Ends early where a rank says why the run ends."""
        elsewhere = any(not peer.is_here for peer in self.known.values())
        deadline = time.monotonic() + seconds + (_BROKEN + _BEAT if elsewhere else 0.0)
        limit = min(_BROKEN, self.silent_after) if elsewhere else None
        while not (gone := self.gone(limit)) and time.monotonic() < deadline and self.told is None:
            time.sleep(0.1)
        return gone

    def silence(self, peer: Peer) -> float:
        """Seconds since its last sign of life."""
        return self._silences[peer.rank].seconds if peer.rank in self._silences else 0.0

    def elsewhere(self) -> dict[Peer, str]:
        """Waits for a sign of life or two: the ranks that live and are in no collective, and where their main thread is.

        Asked for when a collective has run out of time, and never before: Python gives the frames of a running thread
        (`sys._current_frames`) at the cost that torch's functions in that thread may fail.
        """
        self._asks = True
        every = min(_BEAT, self.silent_after / 8) + _PER_RANK * self._size
        deadline = time.monotonic() + 3 * every
        with suppress(RuntimeError):
            self._set("where", "1")
            while time.monotonic() < deadline and not all(self._places.get(rank) for rank in self.known):
                self._listen()
                time.sleep(_LOOK_AROUND)
        known = ((self.known[rank], place) for rank, place in sorted(self._places.items()) if rank in self.known)
        return {peer: place for peer, place in known if place and not place.startswith(WAITS)}

    def heard(self, peer: Peer) -> bool:
        """Whether that rank knew that it shall stop."""
        with suppress(RuntimeError):
            return self._has(f"heard/{peer.rank}")
        return False

    def offer_log(self, rank: int) -> None:
        """Give the last lines of a rank to rank 0, if it is of this machine."""
        if rank in self.known and not self.known[rank].is_here:
            return
        with suppress(RuntimeError):
            self._keep_log(rank, self.log_of(rank))

    def logs(self) -> dict[int, str]:
        """The last lines of ranks that have failed, as far as somebody has given them."""
        with suppress(RuntimeError):
            return {rank: self._get(f"log/{rank}").decode() for rank in range(self._size) if self._has(f"log/{rank}")}
        return {}

    def said_elsewhere(self) -> str:
        """What a rank on another machine has said there about why the run ends; empty where nobody has."""
        with suppress(RuntimeError):
            if self._has("said"):
                rank, sentence = json.loads(self._get("said"))
                return "" if rank not in self.known or self.known[rank].is_here else str(sentence)
        return ""

    def _has_heard(self, rank: int) -> bool:
        """That rank knows why the run ends, or has left: its own collective broke, and it heard of it on its way out."""
        return self._has(f"knows/{rank}") or self._has(f"bye/{rank}")

    def _keep_log(self, rank: int, text: str) -> None:
        if text:
            self._set(f"log/{rank}", text)

    def _learn(self) -> None:
        for rank in range(self._size):
            if rank != self.rank and rank not in self.known and self._has(f"peer/{rank}"):
                self.known[rank] = Peer(**json.loads(self._get(f"peer/{rank}")))

    def _listen(self) -> None:
        every = min(_BEAT, self.silent_after / 8) + _PER_RANK * self._size
        if time.monotonic() - self._listened < every or not self._listening.acquire(blocking=False):
            return
        try:
            self._listened, ranks = time.monotonic(), sorted(self.known)
            beats = self._reached().multi_get([f"{self.prefix}/beat/{rank}" for rank in ranks]) if ranks else []
            for rank, beat in zip(ranks, beats, strict=True):
                self._silences.setdefault(rank, Silence(2 * every)).look(bytes(beat))
                self._places[rank] = bytes(beat).decode().partition(" ")[2]
        finally:
            self._listening.release()

    def _is_gone(self, peer: Peer, silent_after: float) -> bool:
        ended, silence = peer.has_ended(), self.silence(peer)
        if ended is None and silence > 3 * _BEAT:
            with suppress(RuntimeError):
                ended = self._has(f"ended/{peer.rank}") or None
        if not ended and silence <= silent_after:
            return False
        with suppress(RuntimeError):
            return not self._has(f"bye/{peer.rank}")
        return True

    def _report_ended(self) -> None:
        """What only the ranks of one machine see: that a process there has ended, and what it said last."""
        for peer in self.known.values():
            if peer.rank not in self._reported and peer.has_ended():
                self._reported.add(peer.rank)
                self._keep_log(peer.rank, self.log_of(peer.rank))
                self._set(f"ended/{peer.rank}", "1")

    def _has(self, key: str) -> bool:
        return bool(self._reached().check([f"{self.prefix}/{key}"]))

    def _get(self, key: str) -> bytes:
        return bytes(self._reached().get(f"{self.prefix}/{key}"))

    def _set(self, key: str, value: str) -> None:
        self._reached().set(f"{self.prefix}/{key}", value)

    def _reached(self) -> Any:
        """The store; asked again after it was lost, it might keep who asks for minutes."""
        if self.store_is_lost:
            raise RuntimeError("the key-value store is lost")
        return self._store


def join(stop: Stop) -> Peers | None:
    """Every rank calls it: this rank among the others; None where there are none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    peers = Peers(store, dist.get_rank(), dist.get_world_size(), stop)
    peers.know_all(_TO_JOIN)
    return peers
