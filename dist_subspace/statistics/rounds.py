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
        round_names = names[first : first + size]
        whole_here = _gather_one_each([parts[name].base for name in round_names])  # type: ignore[misc]
        result: T | None = None
        with agreed("a statistic of the frozen weights"), torch.no_grad():
            if whole_here is not None:
                name = round_names[world().rank]
                result = work(name, parts[name], _weight_of(parts[name].base, whole_here, seed_of(seed, name)))  # type: ignore[arg-type]
        del whole_here
        for owner, name in enumerate(round_names):
            yield name, owner, result if owner == world().rank else None


def _gather_one_each(bases: Sequence[FrozenLinear]) -> dict[nn.Parameter, Tensor] | None:
    """Collective: each base's parameters whole on the rank of its number; what this rank got."""
    whole_here: dict[nn.Parameter, Tensor] | None = None
    for rank, base in enumerate(bases):
        whole_tensors = {parameter: gather_to(parameter, rank) for parameter in base.parameters()}
        if rank == world().rank:
            whole_here = {parameter: whole for parameter, whole in whole_tensors.items() if whole is not None}
    return whole_here


def _weight_of(base: FrozenLinear, whole_tensors: Mapping[nn.Parameter, Tensor], seed: int) -> Weight:
    with with_data(whole_tensors):
        matrix = base.dense(torch.float32)
    quantised = None if base.is_float else lambda other: _through_storage(base, other)
    return Weight(matrix, lambda: original_of(base), quantised, torch.Generator().manual_seed(seed))


def _through_storage(base: FrozenLinear, matrix: Tensor) -> Tensor:
    """What the layer's storage makes of a matrix, float32."""
    return base.repacked(matrix).dense(torch.float32)
