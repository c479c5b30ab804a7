"""How a run ends: one sentence on the screen, RUN/status.json, and the exit status; whoever it is that can still speak."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.launchers import is_first
from dist_subspace.placement.collectives import PeerFailed, may_speak, meet, tell_peers, wait_until_told, world
from dist_subspace.placement.heartbeat import Heartbeat
from dist_subspace.placement.peer import Peer
from dist_subspace.placement.peers import Peers
from dist_subspace.run_folder.folder import checkpoint_name
from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_INTERRUPTED, State
from dist_subspace.stopping import STOP
from dist_subspace.training.display import Display
from dist_subspace.training.error_file import tell_torchrun
from dist_subspace.training.plan import Plan
from dist_subspace.training.rank_logs import RankLog, keep_last_lines, last_lines
from dist_subspace.training.run_status import RunStatus
from dist_subspace.training.trainer import Trainer
from dist_subspace.training.whereabouts import has_screen_of_its_own

_PATIENCE = 30.0  # seconds that a rank stays for another one, which failed, to say why
_FEW = 5.0  # seconds in which a rank that was killed shows as ended, after its neighbour's connection broke


class Word:
    """The right to say how the run ends: that of the first thread which asks. A rank is missed by the thread that watches, and by
    the main thread, whose connections break."""

    def __init__(self) -> None:
        self._asking, self._holder = threading.Lock(), 0

    def is_mine(self) -> bool:
        with self._asking:
            self._holder = self._holder or threading.get_ident()
            return self._holder == threading.get_ident()

    def take(self) -> None:
        """Wait, where another thread has it: that one ends the process."""
        while not self.is_mine():
            time.sleep(1.0)


@dataclass
class Run:
    """What is known of a run so far."""

    config: Config | None = None
    status: RunStatus | None = None
    plan: Plan | None = None
    trainer: Trainer | None = None
    peers: Peers | None = None
    heartbeat: Heartbeat | None = None
    has_logs: bool = False  # whether ranks say into logs of their own
    dry: bool = False  # whether it ends before its first step
    display: Display | None = None
    log: RankLog | None = None
    open_log: Callable[[Sequence[int]], RankLog] | None = None
    traceback: str = ""
    result: Path | None = None  # the final adapter, of a run that is through
    word: Word = field(default_factory=Word)

    @property
    def screen(self) -> TextIO:
        return sys.stderr if self.log is None else self.log.screen

    @property
    def saved(self) -> int:
        """The step that the same command goes on after; 0: it begins anew."""
        if self.trainer is not None and self.trainer.saved is not None:
            return self.trainer.saved[0]
        return self.plan.checkpoint[1].step if self.plan is not None and self.plan.checkpoint else 0

    @property
    def has_saved(self) -> bool:
        """Whether the newest checkpoint in its folder is this run's own. Until then it may be one of another history."""
        saved = None if self.trainer is None else self.trainer.saved
        begun = self.plan.checkpoint[1].step if self.plan is not None and self.plan.checkpoint else 0
        return saved is not None and saved[0] > begun

    @property
    def step(self) -> int | None:
        """The last whole step."""
        if self.trainer is not None and self.trainer.progress.step:
            return self.trainer.progress.step
        return None if self.plan is None else self.saved


def end(
    run: Run,
    state: State,
    message: str,
    code: int,
    step: int | None = None,
    everywhere: bool = False,
    at_fault: Peer | None = None,
) -> int:
    """Say how it ended: one sentence from rank 0, or, `everywhere`, from the rank where it happened; from one where it happened
    to several. `at_fault`: another rank than the one that speaks."""
    run.word.take()
    rank = world().rank
    if everywhere and not may_speak():
        return wait_until_told(_PATIENCE) or code
    by, host = (rank, socket.gethostname()) if at_fault is None else (at_fault.rank, at_fault.host)
    if everywhere and world().size > 1 and at_fault is None:
        message = f"rank {rank} on {host}: {message}"
    said = message if state == "interrupted" else f"error: {message}"
    if rank == 0 or everywhere:
        say(run, said)
    if run.status is not None:
        run.status.write(state, message, step, by, anyone=everywhere, rank_host=host)
    if everywhere:
        keep_own_log(run)
        tell_peers(code, own_log(run), said)
    else:
        with suppress(PeerFailed):
            meet()  # a launcher ends all ranks with the first one that leaves: rank 0 must have spoken by then
    return code


def say(run: Run, sentence: str) -> None:
    """Local: the last words, on the screen; in this rank's own log, too. The live line ends first: it would fold them, be drawn
    over them, and leave a terminal without its cursor where the process ends at once."""
    if run.display is not None:
        run.display.close()
    print(sentence, file=run.screen, flush=True)
    tell_torchrun(sentence)
    if run.screen is not sys.stderr:
        print(sentence, file=sys.stderr, flush=True)


def own_log(run: Run) -> str:
    """What this rank said last. Of rank 0, whose screen is no file, that is the traceback alone."""
    return run.traceback if run.log is None else last_lines(run.log.path)


def keep_own_log(run: Run) -> None:
    """Local: in RUN/logs, if this rank sees the run's folder; rank 0 does it as well, for those that do not (`hear`)."""
    if world().size > 1 and run.status is not None and run.status.sees_folder() and (text := own_log(run)):
        keep_last_lines(run.status.run, world().rank, text)


def hear(run: Run) -> None:
    """Local, rank 0: another rank has said why the run ends. That stays the last word on the screen, also on this node's own
    where it has one: what the libraries say of connections that break then goes into a log."""
    quieten(run)
    keep_logs(run)
    if run.peers is not None and has_screen_of_its_own() and (said := run.peers.said_elsewhere()):
        say(run, said)


def quieten(run: Run) -> None:
    """Local: standard error goes into this rank's log from now on; the screen is for the last words."""
    if run.log is None and run.open_log is not None:
        with suppress(UsageError, OSError):
            run.log = run.open_log((2,))


def keep_logs(run: Run) -> None:
    """Local, rank 0: what it was given of failing ranks' logs, into RUN/logs."""
    if run.status is not None and run.status.taken and run.peers is not None and world().is_main:
        for rank, text in run.peers.logs().items():
            keep_last_lines(run.status.run, rank, text)


def interrupted_text(run: Run, reason: str) -> str:
    if run.plan is None:  # whether there is a checkpoint to go on from is not known yet
        after = "before the first step"
    else:
        after = f"after step {run.saved}" if run.saved else "before the first step was saved"
    return f"interrupted by {reason} {after}; {_to_continue(run)}"


def left_at_once(run: Run, reason: str) -> int:
    """Local: the last words of a process that does not wait for the others."""
    if world().is_main and is_first():
        message = interrupted_text(run, reason)
        say(run, message)
        if run.status is not None:
            run.status.write("interrupted", message, run.saved)
    return EXIT_INTERRUPTED


def end_after_another(run: Run) -> int:
    """Another rank failed, and its status is for it to write."""
    run.word.take()
    return wait_until_told(_PATIENCE) or EXIT_FAILED


def peers_at_fault(run: Run, error: Exception) -> list[Peer] | None:
    """The ranks whose end this error may come from; [] where they have said why themselves; None where it is this rank's own."""
    if run.peers is None or not _may_come_from_a_peer(error):
        return None
    run.word.take()
    if wait_until_told(0.2):
        return []
    gone = run.peers.gone_within(_FEW)
    return gone if gone or wait_until_told(0.2) else None


def end_waiting(run: Run, error: Exception) -> int | None:
    """A collective has run out of time though every rank lives: the first that speaks names those that did not come to it, and
    where they are instead. None where this error is another one."""
    absent = run.peers.elsewhere() if run.peers is not None and "timed out" in str(error).lower() else {}
    if not absent:
        return None
    who = "; ".join(f"{peer} lives, but is in {place}" for peer, place in absent.items())
    message = f"a collective ran out of time: {who}; after step {run.step or 0}; {goes_on_text(run)}"
    return end(run, "failed", message, EXIT_FAILED, run.step, everywhere=True, at_fault=next(iter(absent)))


def end_without(run: Run, gone: list[Peer]) -> int:
    """Another rank ended, without a word or with one: the first of those that are left speaks for it."""
    run.word.take()
    if (told := wait_until_told(0.1)) or not gone:
        return told or EXIT_FAILED
    left = min(rank for rank in range(world().size) if rank not in {peer.rank for peer in gone})
    who = ", ".join(map(str, gone))
    if run.peers is not None and STOP and all(map(run.peers.heard, gone)):
        state: State = "interrupted"
        message, status = f"interrupted by {STOP.reason}; {who} was ended before it had saved", EXIT_INTERRUPTED
    else:
        state, message, status = "failed", f"{who} was killed, or crashed", EXIT_FAILED
        if run.heartbeat is not None and (pause := run.heartbeat.was_paused()):
            message = (
                f"rank {world().rank} on {socket.gethostname()} was stopped for {pause:.0f} s, and the others have left"
            )
    message = f"{message}, after step {run.step or 0}; {goes_on_text(run)}"
    if run.peers is not None:
        for peer in gone:
            run.peers.offer_log(peer.rank)
    if world().rank == left:
        say(run, f"error: {message}" if state == "failed" else message)
        if run.status is not None:
            run.status.write(state, message, run.step, gone[0].rank, anyone=True, rank_host=gone[0].host)
        keep_logs(run)
        tell_peers(status)
    else:
        wait_until_told(_FEW)
    return status


def goes_on_text(run: Run) -> str:
    return f"{_to_continue(run)} {f'from {checkpoint_name(run.saved)}' if run.saved else 'from the beginning'}"


def _to_continue(run: Run) -> str:
    same = run.config is None or run.config.checkpoint.resume == "auto" or not run.has_saved
    return f"run the same command{'' if same else ' with checkpoint.resume=auto'} to continue"


_OF_CONNECTIONS = ("gloo", "nccl", "connection", "broken pipe")


def _may_come_from_a_peer(error: Exception) -> bool:
    """Whether this is what a rank sees when another one ends: gloo raises a plain RuntimeError."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_CONNECTIONS)
