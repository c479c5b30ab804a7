"""Work on whole frozen matrices, shared out: in each round every rank gets one layer's packed bytes, makes them dense, and works
on them while the others work on theirs. A rank holds one dense matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_subspace.loading.original import original_of, original_stack
from dist_subspace.placement.collectives import agreed, world
from dist_subspace.placement.tensors import gather_to, with_data
from dist_subspace.storage import FrozenLinear, FrozenStack
from dist_subspace.subspace import Decomposes, Weight
from dist_subspace.subspace.attach import seed_of

T = TypeVar("T")
P = TypeVar("P", bound=Decomposes)


def in_rounds(
    parts: Mapping[str, P], work: Callable[[str, P, Any], T], seed: int
) -> Iterator[tuple[str, int, T | None]]:
    """Collective: (name, the rank that worked, its result there and None elsewhere) for every part, in order.

    `work` is local, and is given the part's name, the part, and its `Weight` (of a stack of experts: `ExpertWeights`). If it
    raises on one rank, every rank raises.
    """
    names, size = list(parts), world().size
    for first in range(0, len(names), size):
        round_names = names[first : first + size]
        whole_here = _gather_one_each([parts[name].base for name in round_names])
        result: T | None = None
        with agreed("a statistic of the frozen weights"), torch.no_grad():
            if whole_here is not None:
                name = round_names[world().rank]
                with _weight_of(parts[name].base, whole_here, seed, name) as weight:
                    result = work(name, parts[name], weight)
        del whole_here
        for owner, name in enumerate(round_names):
            yield name, owner, result if owner == world().rank else None


def _gather_one_each(bases: Sequence[nn.Module]) -> dict[nn.Parameter, Tensor] | None:
    """Collective: each base's parameters whole on the rank of its number; what this rank got."""
    whole_here: dict[nn.Parameter, Tensor] | None = None
    for rank, base in enumerate(bases):
        whole_tensors = {parameter: gather_to(parameter, rank) for parameter in base.parameters()}
        if rank == world().rank:
            whole_here = {parameter: whole for parameter, whole in whole_tensors.items() if whole is not None}
    return whole_here


@contextmanager
def _weight_of(
    base: FrozenLinear | FrozenStack, whole_tensors: Mapping[nn.Parameter, Tensor], seed: int, name: str
) -> Iterator[Weight | ExpertWeights]:
    if isinstance(base, FrozenStack):
        with with_data(whole_tensors):
            yield ExpertWeights(base, seed, name)
        return
    with with_data(whole_tensors):
        matrix = base.dense(torch.float32)
    yield _laid_open(base, matrix, lambda: original_of(base), seed_of(seed, name))


class ExpertWeights:
    """The weights of a stack's experts, whose parameters are whole as long as this is used: one is made dense when it is asked
    for. An expert's random draws depend on its number and the stack's name alone."""

    def __init__(self, stack: FrozenStack, seed: int, name: str) -> None:
        self.stack, self.seed, self.name = stack, seed, name
        self._originals = cache(lambda: original_stack(stack))

    def __getitem__(self, number: int) -> Weight:
        expert = self.stack.expert(number)
        matrix = expert.dense(torch.float32)
        seed = seed_of(self.seed, f"{self.name}.{number}")
        return _laid_open(expert, matrix, lambda: self._originals()[number].to(matrix), seed)


def _laid_open(operator: FrozenLinear, matrix: Tensor, original: Callable[[], Tensor], seed: int) -> Weight:
    quantised = None if operator.is_float else lambda other: _through_storage(operator, other)
    return Weight(matrix, original, quantised, torch.Generator().manual_seed(seed))


def _through_storage(base: FrozenLinear, matrix: Tensor) -> Tensor:
    """What the layer's storage makes of a matrix, float32."""
    return base.repacked(matrix).dense(torch.float32)
