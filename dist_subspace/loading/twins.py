"""Tensors of a checkpoint that may be one parameter: compared by all ranks together, a part of the rows each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from dist_subspace.loading.index import CheckpointIndex, Pair
from dist_subspace.loading.transformers_internals import KeyPlan, tied_pairs
from dist_subspace.placement.collectives import world
from dist_subspace.placement.protocol import Splitter


def twins(model: nn.Module, plan: KeyPlan) -> list[Pair]:
    """What has to be the same, or decides what is tied: several keys of one parameter, and both of a pair that the model ties."""
    found = [(keys[0], other, torch.float32) for keys in plan.direct.values() for other in keys[1:]]
    held = dict(model.named_parameters(remove_duplicate=False))
    for target, source in tied_pairs(model).items():
        if target in plan.direct and source in plan.direct and plan.direct[target][0] != plan.direct[source][0]:
            found.append((plan.direct[target][0], plan.direct[source][0], held[target].dtype))
    return found


def compare(
    pairs: list[Pair],
    index: CheckpointIndex,
    splitter: Splitter,
    together: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Collective where several ranks load the model: what each has found in its rows is what `index.same` says on all of them.

    Arguments:
        together: as `collectives.agreed`.
    """
    ranks, own = splitter.of_all(world().rank), dict[Pair, bool]()
    with together("comparing tensors of the checkpoint"):
        part = ranks.index(world().rank), len(ranks)
        for one, other, dtype in pairs:
            own[one, other, dtype] = index.same(one, other, dtype, part)
    everyones = splitter.of_all(own)
    index.compared.update({pair: all(found[pair] for found in everyones) for pair in own})
