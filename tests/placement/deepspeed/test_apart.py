"""A module that is set apart is none of the engine's: it calls none of its hooks, and shows what it holds and no more."""

from __future__ import annotations

import torch
from torch import nn

from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.apart import is_gathered_when_called, marked_whole, set_apart, show_shards
from tests.matrix import tiny
from tests.ranks import run_on_ranks


class Two(nn.Module):
    """The second reads the weight of the first, beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.seen: list[tuple[int, int]] = []
        self.one.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.one.weight.numel(), self.other(x).shape[0]))
        return self.other(x)


def seen(apart: bool, quiet: bool, marked: bool) -> tuple[list[tuple[int, int]], list[bool]]:
    model = Two()
    config = tiny.ds_config(3, world_size=world().size)
    from dist_subspace.placement.deepspeed.engine import initialize

    engine = initialize(model, torch.optim.SGD(model.other.parameters(), lr=0.1), config)
    own = [is_gathered_when_called(module) for module in (model.one, model.other)]
    if apart:
        set_apart(model.one)
    if quiet:
        show_shards(model.one)
    for _ in range(2):
        if marked:
            with marked_whole(model.one.weight, True):
                engine(torch.ones(1, 4))
        else:
            engine(torch.ones(1, 4))
    own += [is_gathered_when_called(module) for module in (model.one, model.other)]
    engine.destroy()
    return model.seen, own


def test_the_hooks_are_the_engines_own() -> None:
    for apart in (True, False):
        for _, own in run_on_ranks(2, seen, apart, False, False):
            assert own == [True, True, not apart, True]


def test_a_weight_that_is_asked_for_is_gathered_unless_it_is_shown_as_it_is() -> None:
    for quiet, marked, entries in ((False, False, 16), (True, False, 0), (False, True, 0)):
        for found, _ in run_on_ranks(2, seen, True, quiet, marked):
            assert found == [(entries, 1)] * 2
