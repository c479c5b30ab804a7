"""Whole parameters on every rank, of which each reads a part."""

from __future__ import annotations

import socket

import pytest
import torch

from dist_subspace.placement.collectives import world
from dist_subspace.placement.replicas import Replicas
from tests.ranks import run_on_ranks

SHAPES = ((3, 5), (2,), (), (40, 7))


def filled(hosts: int) -> tuple[list[torch.Tensor], list[int], torch.Tensor]:
    """What a rank has after each has written numbers of its own; which entries it wrote; a sum over its node."""
    rank, name = world().rank, socket.gethostname
    socket.gethostname = lambda: f"host{rank % hosts}"  # ranks that do not follow one another
    try:
        replicas = Replicas(torch.device("cpu"), alone=False)
    finally:
        socket.gethostname = name
    made, counts = [], []
    for shape in SHAPES:
        parameter, part, memory = replicas.hold(shape, torch.float32)
        assert memory.numel() == part.length == part.stop - part.start and not parameter.requires_grad
        memory.copy_(100 * rank + torch.arange(part.start, part.stop))
        made.append(parameter.data)
        counts.append(part.length)
    total = replicas.summed(torch.tensor([1.0]))
    replicas.complete()
    assert replicas.of_all(rank) == list(range(world().size)) and replicas.of_first(rank) == 0
    return made, counts, total


@pytest.mark.parametrize(("ranks", "hosts"), [(1, 1), (2, 1), (3, 1), (3, 2), (2, 2)])
def test_each_entry_is_read_by_one_rank_of_a_node_and_is_on_all_of_them(ranks: int, hosts: int) -> None:
    found = run_on_ranks(ranks, filled, hosts)
    for host in range(hosts):
        mine = [rank for rank in range(ranks) if rank % hosts == host]
        for number, shape in enumerate(SHAPES):
            numel = torch.Size(shape).numel()
            assert sum(found[rank][1][number] for rank in mine) == numel
            assert all(torch.equal(found[rank][0][number], found[mine[0]][0][number]) for rank in mine)
            flat = found[mine[0]][0][number].reshape(-1)
            assert flat.shape == (numel,) and torch.equal(flat % 100, torch.arange(numel) % 100.0)
        assert all(float(found[rank][2]) == len(mine) for rank in mine)


def test_a_process_that_loads_for_itself_asks_nobody() -> None:
    alone = Replicas(torch.device("cpu"), alone=True)
    parameter, part, memory = alone.hold((2, 3), torch.bfloat16)
    memory.fill_(1)
    assert (part.start, part.stop) == (0, 6) and bool((parameter == 1).all())
    assert alone.of_all("a") == ["a"] and alone.of_first("a") == "a" and float(alone.summed(torch.ones(()))) == 1
    alone.complete()
    assert not alone.splits and alone.takes_parts
