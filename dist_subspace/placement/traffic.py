"""Bytes that training sends in one optimizer step, computed from sizes alone; `tests/placement/test_traffic.py` counts them.

Bytes are those of a ring, as NCCL has it for what is large: to gather n shards, each rank sends n - 1 of them on; to sum and
scatter, as much; to sum on all ranks, twice that, which gloo does in place of a sum that is scattered, too. Ranks of a node
follow one another, so a ring over all ranks leaves each node once: what a rank sends, a node sends. A few numbers a step (the
gradient's norm, the loss) are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dist_subspace.families.blocks import blocks
from dist_subspace.placement.tensors import full_numel

_GRADIENT = 4  # bytes: adapters, their gradients and their sums are float32
_ALIGNMENT = 2  # ZeRO 1 and 2 pad a group of parameters to a multiple of this times the ranks


@dataclass(frozen=True)
class Unit:
    """What ZeRO-3 gathers at once: a decoder block, or another module with weights of its own.

    frozen: (elements, bytes of one) of each tensor, as it is stored. trained: elements of the trained ones, which stay whole.
    in_backward: whether its backward reads the weights; a frozen embedding's does not.
    """

    frozen: tuple[tuple[int, int], ...]
    trained: int = 0
    in_backward: bool = True

    @property
    def numel(self) -> int:
        return sum(numel for numel, _ in self.frozen) + self.trained

    def shard(self, ranks: int) -> int:
        """Bytes of a rank's shards; each tensor is cut into equal ones, rounded up."""
        return sum(_shard(numel, ranks) * size for numel, size in self.frozen)


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
    whole = {id(block) for block in blocks(model)}
    inside = {id(inner) for block in blocks(model) for inner in block.modules() if inner is not block}
    units = []
    for module in model.modules():
        own = list(module.parameters(recurse=id(module) in whole))
        if own and id(module) not in inside:
            frozen = tuple((full_numel(p), p.element_size()) for p in own if not p.requires_grad)
            trained = sum(full_numel(p) for p in own if p.requires_grad)
            units.append(Unit(frozen, trained, bool(trained) or not isinstance(module, nn.Embedding)))
    return Sizes(tuple(units), tuple(tuple(full_numel(p) for p in group) for group in groups))


def step_traffic(
    sizes: Sizes, stage: int, ranks: int, ranks_per_node: int, *, second_shards: bool = False, rounds: int = 1
) -> Traffic:
    """Local: what a step of the presets sends.

    The blocks are leaves of ZeRO-3 (`leaf_blocks.py`), with activation checkpointing or without.

    Arguments:
        second_shards: weights are split inside nodes too (zero3-hpz).
        rounds: micro-batches of a rank in one optimizer step.
    """
    near = ranks_per_node if second_shards else ranks
    gathered = _gathered(sizes.units) if stage == 3 else []
    weights = rounds * sum(unit.shard(ranks) * (ranks // near) * (near - 1) for unit in gathered)
    crosses = ranks > ranks_per_node
    return Traffic(
        Sent(weights, weights if near > ranks_per_node else 0),
        _over_all(_summed(sizes.trained, stage, ranks, rounds), crosses),
        _over_all(_trained_again(sizes.trained, stage, ranks), crosses),
    )


def _gathered(units: Sequence[Unit]) -> list[Unit]:
    """The units in the order in which a micro-batch gathers them: all in forward, and in backward those whose weights it reads,
    but for the ones that DeepSpeed has kept because so few elements lie between (`stage3_max_reuse_distance`)."""
    reuse = max((sum(numel for numel, _ in unit.frozen) for unit in _repeated(units)), default=0)
    backward = [number for number in reversed(range(len(units))) if units[number].in_backward]
    order = [*range(len(units)), *backward]
    again = []
    for number in backward:
        between = 0
        for other in order[number + 1 :]:
            if other == number and between < reuse:
                break
            between += units[other].numel
            if between >= reuse:
                again.append(units[number])
                break
    return [*units, *again]


def _repeated(units: Sequence[Unit]) -> list[Unit]:
    """The blocks: those that hold several tensors."""
    return [unit for unit in units if len(unit.frozen) > 1]


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
