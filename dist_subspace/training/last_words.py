"""How a run ends: one sentence on the screen, RUN/status.json, and the exit status; whoever it is that can still speak."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass

import torch

from dist_subspace.config import Config
from dist_subspace.launchers import is_first
from dist_subspace.placement.collectives import PeerFailed, may_speak, meet, tell_peers, wait_until_told, world
from dist_subspace.placement.peers import Peer, Peers
from dist_subspace.run_folder.folder import checkpoint_name
from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_INTERRUPTED, State
from dist_subspace.stopping import STOP
from dist_subspace.training.plan import Plan
from dist_subspace.training.run_status import RunStatus
from dist_subspace.training.trainer import Trainer

_PATIENCE = 30.0  # seconds that a rank stays for another one, which failed, to say why
_FEW = 5.0  # seconds in which a rank that was killed shows as ended, after its neighbour's connection broke


@dataclass
class Run:
    """What is known of a run so far."""

    config: Config | None = None
    status: RunStatus | None = None
    plan: Plan | None = None
    trainer: Trainer | None = None
    peers: Peers | None = None

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


def end(run: Run, state: State, message: str, code: int, step: int | None = None, everywhere: bool = False) -> int:
    """Say how it ended: one sentence from rank 0, or, `everywhere`, from the rank where it happened; from one where it happened
    to several."""
    rank = world().rank
    if everywhere and not may_speak():
        return wait_until_told(_PATIENCE) or code
    if rank == 0 or everywhere:
        print(message if state == "interrupted" else f"error: {message}", file=sys.stderr, flush=True)
    if run.status is not None:
        run.status.write(state, message, step, rank, anyone=everywhere)
    if everywhere:
        tell_peers(code)
    else:
        with suppress(PeerFailed):
            meet()  # a launcher ends all ranks with the first one that leaves: rank 0 must have spoken by then
    return code


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
        print(message, file=sys.stderr, flush=True)
        if run.status is not None:
            run.status.write("interrupted", message, run.saved)
    return EXIT_INTERRUPTED


def end_after_another() -> int:
    """Another rank failed, and its status is for it to write."""
    return wait_until_told(_PATIENCE) or EXIT_FAILED


def peers_at_fault(run: Run, error: Exception) -> list[Peer] | None:
    """The ranks whose end this error may come from; [] where they have said why themselves; None where it is this rank's own."""
    if run.peers is None or not _may_come_from_a_peer(error):
        return None
    if wait_until_told(0.2):
        return []
    gone = run.peers.gone_within(_FEW)
    return gone if gone or wait_until_told(0.2) else None


def end_without(run: Run, gone: list[Peer]) -> int:
    """Another rank ended, without a word or with one: the first of those that are left speaks for it."""
    if (told := wait_until_told(0.1)) or not gone:
        return told or EXIT_FAILED
    left = min(rank for rank in range(world().size) if rank not in {peer.rank for peer in gone})
    who = ", ".join(map(str, gone))
    if run.peers is not None and STOP and all(map(run.peers.heard, gone)):
        state: State = "interrupted"
        message, status = f"interrupted by {STOP.reason}; {who} was ended before it had saved", EXIT_INTERRUPTED
    else:
        state, message, status = "failed", f"{who} was killed, or crashed", EXIT_FAILED
    goes_on = f"from {checkpoint_name(run.saved)}" if run.saved else "from the beginning"
    message = f"{message}, after step {run.step or 0}; {_to_continue(run)} {goes_on}"
    if world().rank == left:
        print(f"error: {message}" if state == "failed" else message, file=sys.stderr, flush=True)
        if run.status is not None:
            run.status.write(state, message, run.step, gone[0].rank, anyone=True)
        tell_peers(status)
    else:
        wait_until_told(_FEW)
    return status


def _to_continue(run: Run) -> str:
    same = run.config is None or run.config.checkpoint.resume == "auto" or not run.has_saved
    return f"run the same command{'' if same else ' with checkpoint.resume=auto'} to continue"


_OF_CONNECTIONS = ("gloo", "nccl", "connection", "broken pipe")


def _may_come_from_a_peer(error: Exception) -> bool:
    """Whether this is what a rank sees when another one ends: gloo raises a plain RuntimeError."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_CONNECTIONS)
