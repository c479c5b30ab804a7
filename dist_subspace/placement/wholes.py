"""What rank 0 makes of parameters that are split over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from dist_subspace.placement.collectives import agreed, world
from dist_subspace.placement.deepspeed.shards import gather_to, lent

T = TypeVar("T")


def on_wholes(parameters: Iterable[nn.Parameter], what: str, function: Callable[[], T]) -> T | None:
    """Collective where the parameters are split: `function()` on rank 0, with whole parameters; None on the others, which hold
    no more than before. What it raises, every rank raises.

    Arguments:
        what: rank 0 is doing, for the other ranks' error.
    """
    wholes = {parameter: gather_to(parameter, 0) for parameter in parameters}
    with agreed(what), torch.no_grad():
        if world().is_main:
            with lent({parameter: whole for parameter, whole in wholes.items() if whole is not None}):
                return function()
    return None
