"""How the ranks lie on the nodes, as their launchers say it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from dist_subspace import launchers
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import agreed, gather_objects


@dataclass(frozen=True)
class Seat:
    """A rank's node, its number there, and how many ranks the node has; None where the launcher does not say."""

    host: str
    local_rank: int
    local_size: int | None


def ranks_per_node(preset: str) -> int:
    """Collective: how many ranks every node has.

    Arguments:
        preset: what needs the number, for messages.

    Raises:
        UsageError: on every rank, with the same sentence (`alike`).
    """
    place = launchers.read(os.environ)
    seats = gather_objects(Seat(socket.gethostname(), place.local_rank, place.local_size))
    with agreed("counting the ranks of each node"):
        return alike(preset, seats)


def alike(preset: str, seats: Sequence[Seat]) -> int:
    """Local: the number of ranks of each node, where it is one for all and the ranks of a node follow one another.

    So they do under deepspeed, torchrun, and by default under srun, mpirun and mpiexec; not with srun's
    `--distribution=cyclic` and mpirun's `--map-by node`.

    Arguments:
        seats: of all ranks, in rank order; more than one node.

    Raises:
        UsageError: nodes of unlike size or of one rank, ranks in another order, a single node, or a launcher that does not say.
    """
    needs, size = f"deepspeed.preset is {preset!r}", seats[0].local_size
    if len(seats) in (1, size):
        raise UsageError(
            f"{needs}, but the whole run is on one node, where second shards would take memory and save nothing; accepted: zero3"
        )
    for rank, seat in enumerate(seats):
        where = f"rank {rank} on {seat.host}"
        if seat.local_size is None or size is None:
            raise UsageError(
                f"{needs}, and the launcher of {where} does not say how many ranks its node has; accepted: LOCAL_WORLD_SIZE set "
                "to that number for every rank"
            )
        if seat.local_size != size:
            raise UsageError(
                f"{needs}, which needs as many ranks on every node, but {where} is one of {seat.local_size}, and rank 0 on "
                f"{seats[0].host} one of {size}; accepted: nodes that are alike, or zero3"
            )
        if seat.local_rank != rank % size:
            raise UsageError(
                f"{needs}, which needs the ranks of a node to follow one another, but {where} is number {seat.local_rank} of "
                f"{size} there; accepted: srun --distribution=block, mpirun --map-by slot, or zero3"
            )
    assert size is not None
    if size == 1:
        raise UsageError(
            f"{needs}, but each node has one rank, which would keep all weights; accepted: zero3, or zero2, which keeps them "
            "whole on every rank"
        )
    if len(seats) % size:
        raise UsageError(f"{needs}, but {len(seats)} ranks are no whole number of nodes of {size}; accepted: zero3")
    return size
