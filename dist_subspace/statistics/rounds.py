"""Work on whole frozen matrices, shared out: in each round every rank gets one layer's packed bytes, makes them dense, and works
on them while the others work on theirs. A rank holds one dense matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from dist_subspace.loading.original import original_of
from dist_subspace.placement.collectives import agreed, world
from dist_subspace.placement.tensors import gather_to, with_data
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import SubspaceLinear, Weight
from dist_subspace.subspace.attach import seed_of

T = TypeVar("T")
P = TypeVar("P", bound=SubspaceLinear)


def in_rounds(
    parts: Mapping[str, P], work: Callable[[str, P, Weight], T], seed: int
) -> Iterator[tuple[str, int, T | None]]:
    """Collective: (name, the rank that worked, its result there and None elsewhere) for every part, in order.

    `work` is local. If it raises on one rank, every rank raises.
    """
    names, size = list(parts), world().size
    for first in range(0, len(names), size):
        turn = names[first : first + size]
        mine = _gather_own([parts[name].base for name in turn])  # type: ignore[misc]
        result: T | None = None
        with agreed("a statistic of the frozen weights"), torch.no_grad():
            if mine is not None:
                name = turn[world().rank]
                result = work(name, parts[name], _open(parts[name].base, mine, seed_of(seed, name)))  # type: ignore[arg-type]
        del mine
        for owner, name in enumerate(turn):
            yield name, owner, result if owner == world().rank else None


def _gather_own(bases: Sequence[FrozenLinear]) -> dict[nn.Parameter, Tensor] | None:
    """Collective: each base's parameters whole on the rank of its number; what this rank got."""
    mine: dict[nn.Parameter, Tensor] | None = None
    for rank, base in enumerate(bases):
        wholes = {parameter: gather_to(parameter, rank) for parameter in base.parameters()}
        if rank == world().rank:
            mine = {parameter: whole for parameter, whole in wholes.items() if whole is not None}
    return mine


def _open(base: FrozenLinear, wholes: Mapping[nn.Parameter, Tensor], seed: int) -> Weight:
    with with_data(wholes):
        matrix = base.dense(torch.float32)
    quantised = None if base.is_float else lambda other: _through_storage(base, other)
    return Weight(matrix, lambda: original_of(base), quantised, torch.Generator().manual_seed(seed))


def _through_storage(base: FrozenLinear, matrix: Tensor) -> Tensor:
    """What the layer's storage makes of a matrix, float32."""
    return base.repacked(matrix).dense(torch.float32)
