"""What is said when a rank was lost, with its host or not, while the main threads of the others wait in a collective for it."""

from __future__ import annotations

import socket
import time
from itertools import groupby

from dist_subspace.placement.collectives import tell_peers, world
from dist_subspace.placement.heartbeat import Loss
from dist_subspace.placement.peer import Peer, this_machine
from dist_subspace.run_folder.status import EXIT_FAILED
from dist_subspace.training.last_words import Run, end_without, goes_on_text, keep_logs, keep_own_log, say

_HEARING = 4.0  # seconds in which the rank that speaks is heard
_FOR_RANK_0 = 3.0  # seconds that rank 0 has to write RUN/status.json, where it lives and was not the one that was lost


def end_without_lost(run: Run, loss: Loss) -> int:
    """Local, on a thread beside the main one: the last words of this process, and its exit status."""
    if not run.word.is_mine():  # the main thread has noticed, too, and is speaking
        time.sleep(_HEARING)
        return _status_told(run)
    if not loss.silent:  # processes of this machine have ended, and no connection has broken
        return end_without(run, loss.gone)
    rank, here = world().rank, socket.gethostname()
    at_fault = (rank, here) if loss.alone or not loss.gone else (loss.gone[0].rank, loss.gone[0].host)
    message = f"{lost_text(rank, here, loss)}; after step {run.step or 0}; {goes_on_text(run)}"
    if loss.store and not loss.alone:
        _end_together(run, loss, message, at_fault)
    elif _is_first_here(run, loss):
        say(run, f"error: {message}")
        _write_alone(run, loss, message, at_fault)
    return _status_told(run)


def lost_text(rank: int, here: str, loss: Loss) -> str:
    """Who was lost, and how that shows; names each rank with its process and host."""
    who, silent = ", ".join(map(str, loss.gone)) or "the host at which the ranks meet", f"for {loss.silent:.0f} s"
    if loss.alone:
        return (
            f"rank {rank} on {here} has heard nothing of {who} {silent}, and no other host answers: {here} was cut off"
        )
    stopped = [str(peer) for peer in loss.gone if peer.is_stopped()]
    if stopped and len(stopped) == len(loss.gone):
        return f"{who} was stopped (SIGSTOP), and has given no sign of life {silent}"
    text = f"{who} has given no sign of life {silent}"
    for host, peers in groupby(loss.gone, key=lambda peer: peer.host):
        if any(peer.is_here for peer in peers):
            continue
        told = "answers: its process hangs" if host in loss.answers else "does not answer: it or its link is down"
        text += f", and {host} {told}"
    return text


def _end_together(run: Run, loss: Loss, message: str, at_fault: tuple[int, str]) -> None:
    """The ranks that are left still hear each other: the first of them speaks."""
    assert run.peers is not None
    _give_logs(run, loss.gone)
    left = min(rank for rank in range(world().size) if rank not in {peer.rank for peer in loss.gone})
    if world().rank != left:
        deadline = time.monotonic() + _HEARING
        while run.peers.told is None and not run.peers.store_is_lost and time.monotonic() < deadline:
            run.peers.look()
            time.sleep(0.1)
        return
    say(run, f"error: {message}")
    if run.status is not None:
        run.status.write("failed", message, run.step, at_fault[0], anyone=True, rank_host=at_fault[1])
    keep_logs(run)
    tell_peers(EXIT_FAILED)


def _write_alone(run: Run, loss: Loss, message: str, at_fault: tuple[int, str]) -> None:
    """Without the store: rank 0 writes, and where it is silent whoever still sees that the run's folder says `running`. A rank
    whose own host was cut off leaves the word to the others."""
    if run.status is None or (loss.alone and world().rank != 0):
        return
    if world().rank != 0:
        time.sleep(_FOR_RANK_0)
        if not run.status.is_running():
            return
    run.status.write("failed", message, run.step, at_fault[0], anyone=True, rank_host=at_fault[1])
    keep_own_log(run)


def _give_logs(run: Run, gone: list[Peer]) -> None:
    """What only the ranks of its machine see of a rank that was lost: its log."""
    assert run.peers is not None
    for peer in gone:
        if peer.is_here:
            run.peers.offer_log(peer.rank)


def _is_first_here(run: Run, loss: Loss) -> bool:
    """Whether this is the first rank of those that are left on this machine: nothing tells here what others say."""
    assert run.peers is not None
    lost = {peer.rank for peer in loss.gone}
    here = [peer.rank for peer in run.peers.known.values() if peer.machine == this_machine() and peer.rank not in lost]
    return world().rank < min(here, default=world().size)


def _status_told(run: Run) -> int:
    return (run.peers.told if run.peers is not None else None) or EXIT_FAILED
