"""Bytes that training sends in one optimizer step, computed from sizes alone; `tests/placement/test_traffic.py` counts them.

Bytes are those of a ring, as NCCL has it for what is large: to gather n shards, each rank sends n - 1 of them on; to sum and
scatter, as much; to sum on all ranks, twice that, which gloo does in place of a sum that is scattered, too. Ranks of a node
follow one another, so a ring over all ranks leaves each node once: what a rank sends, a node sends. A few numbers a step (the
gradient's norm, the loss, how many rows ranks ask of each other) are not counted. The loss is our loop's, which is made in the
head's forward (`training/head_loss.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dist_subspace.families.blocks import blocks
from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.placement.engines import GATHERED, LOOKED_UP, pieces_of, use_of
from dist_subspace.placement.tensors import full_numel, full_shape

_ID = 4  # bytes of a row's number
_GRADIENT = 4  # bytes: adapters, their gradients and their sums are float32
_ALIGNMENT = 2  # ZeRO 1 and 2 pad a group of parameters to a multiple of this times the ranks


@dataclass(frozen=True)
class Unit:
    """What ZeRO-3 gathers at once: a decoder block, or another module with weights of its own.

    frozen: (elements, bytes of one) of each tensor, as it is stored. trained: elements of the trained ones, which stay whole.
    in_backward: whether its backward reads the weights; a frozen embedding's does not, nor a frozen head's.
    use, width: how the first tensor is used (`engines.use_of`), and the length of its rows.
    """

    frozen: tuple[tuple[int, int], ...]
    trained: int = 0
    in_backward: bool = True
    use: str = GATHERED
    width: int = 0

    @property
    def numel(self) -> int:
        return sum(numel for numel, _ in self.frozen) + self.trained

    def shard(self, ranks: int) -> int:
        """Bytes of a rank's shards; each tensor is cut into equal ones, rounded up."""
        return sum(_shard(numel, ranks) * size for numel, size in self.frozen)

    def sent(self, ranks: int, near: int, tokens: int) -> int:
        """Bytes that a rank sends when the unit is used once, by shards that `near` ranks have.

        Arguments:
            tokens: different ones of a rank's micro-batch; the rows of them lie on all ranks alike.
        """
        if self.use == GATHERED or near == 1:
            return self.shard(ranks) * (ranks // near) * (near - 1)
        (numel, size), *others = self.frozen
        shard = _shard(numel, ranks) * (ranks // near)
        rest = sum(_shard(n, ranks) * (ranks // near) * s for n, s in others) * (near - 1)
        if self.use == LOOKED_UP:
            return tokens * (near - 1) // near * (_ID + self.width * size)
        pieces, each = pieces_of(numel // self.width, self.width, size, near, shard)
        cut = 1 if shard % self.width else 0  # the ends of rows that lie on two ranks
        return (pieces * each + cut) * self.width * size * (near - 1) + rest


@dataclass(frozen=True)
class Sizes:
    """A model in the order of its forward, and the elements of each trained parameter, by the optimizer's groups."""

    units: tuple[Unit, ...]
    trained: tuple[tuple[int, ...], ...]

    @property
    def frozen_bytes(self) -> int:
        return sum(numel * size for unit in self.units for numel, size in unit.frozen)


@dataclass(frozen=True)
class Sent:
    """Bytes that each rank sends, and bytes that each node sends to other nodes."""

    by_rank: int = 0
    by_node: int = 0


@dataclass(frozen=True)
class Traffic:
    """Of one optimizer step: frozen weights gathered, gradients of the trained parameters summed, these gathered again."""

    weights: Sent
    gradients: Sent
    trained: Sent

    @property
    def total(self) -> Sent:
        parts = (self.weights, self.gradients, self.trained)
        return Sent(sum(part.by_rank for part in parts), sum(part.by_node for part in parts))


def sizes_of(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]]) -> Sizes:
    """Local: the sizes of a model with its method on it, split or not, on the device meta or not.

    Arguments:
        groups: the trained parameters, as the optimizer has them.
    """
    head = output_embeddings(model)
    whole = {id(block) for block in blocks(model)}
    inside = {id(inner) for block in blocks(model) for inner in block.modules() if inner is not block}
    units = []
    for module in model.modules():
        own = list(module.parameters(recurse=id(module) in whole))
        if own and id(module) not in inside:
            frozen = tuple((full_numel(p), p.element_size()) for p in own if not p.requires_grad)
            trained = sum(full_numel(p) for p in own if p.requires_grad)
            once = isinstance(module, nn.Embedding) or module is head
            use = use_of(module, module is head)
            units.append(Unit(frozen, trained, bool(trained) or not once, use, full_shape(own[0])[-1]))
    return Sizes(tuple(units), tuple(tuple(full_numel(p) for p in group) for group in groups))


def step_traffic(
    sizes: Sizes,
    stage: int,
    ranks: int,
    ranks_per_node: int,
    *,
    second_shards: bool = False,
    rounds: int = 1,
    tokens: int = 0,
) -> Traffic:
    """Local: what a step of the presets sends.

    The blocks are leaves of ZeRO-3 (`leaf_blocks.py`), with activation checkpointing or without.

    Arguments:
        second_shards: weights are split inside nodes too (zero3-hpz).
        rounds: micro-batches of a rank in one optimizer step.
        tokens: different ones of a micro-batch, where a table is so large that its rows are looked up where they are.
    """
    near = ranks_per_node if second_shards else ranks
    used = _used(sizes.units) if stage == 3 else []
    weights = rounds * sum(unit.sent(ranks, near, tokens) for unit in used)
    crosses = ranks > ranks_per_node
    return Traffic(
        Sent(weights, weights if near > ranks_per_node else 0),
        _over_all(_summed(sizes.trained, stage, ranks, rounds), crosses),
        _over_all(_trained_again(sizes.trained, stage, ranks), crosses),
    )


def _used(units: Sequence[Unit]) -> list[Unit]:
    """The units in the order in which a micro-batch uses them: all in forward, and again those whose weights backward reads.

    DeepSpeed keeps what is used again soon (`stage3_max_reuse_distance`) by the first order of modules that it has recorded. In
    our loop that is the order of the run which proves the loss, a forward alone: nothing is kept.
    """
    return [*units, *(unit for unit in reversed(units) if unit.in_backward)]


def _summed(trained: Sequence[Sequence[int]], stage: int, ranks: int, rounds: int) -> int:
    """Bytes that a rank sends to sum gradients: below stage 2 once a step, from there on once a micro-batch, because each rank
    keeps its part of the sums alone."""
    if stage == 3:
        return rounds * sum(_shard(numel, ranks) for group in trained for numel in group) * _GRADIENT * (ranks - 1)
    numel = sum(sum(group) for group in trained)
    return (rounds if stage == 2 else 1) * (2 * _GRADIENT * numel * (ranks - 1) // ranks)


def _trained_again(trained: Sequence[Sequence[int]], stage: int, ranks: int) -> int:
    """Bytes that a rank sends after the step, in which it has moved its part of the trained parameters."""
    if stage == 0:
        return 0
    if stage == 3:
        return sum(_shard(numel, ranks) for group in trained for numel in group) * _GRADIENT * (ranks - 1)
    return sum(_shard(sum(group), _ALIGNMENT * ranks) * _ALIGNMENT for group in trained) * _GRADIENT * (ranks - 1)


def _over_all(sent: int, crosses: bool) -> Sent:
    return Sent(sent, sent if crosses else 0)


def _shard(numel: int, ranks: int) -> int:
    return -(-numel // ranks)
