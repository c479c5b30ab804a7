"""Bytes of a step, counted in the collectives of real ranks, are those of the formula, to the byte: four ranks on two nodes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.placement.traffic import Sent, Sizes, Unit, step_traffic
from tests.benchmarks.traffic import RANKS, example, measured
from tests.ranks import ROOT, run_on_ranks
from tests.tiny_models import save_odd
from tests.tiny_run import make_model

CELLS = [
    *((f"zero{stage}", "off", 3) for stage in (0, 1, 2)),
    *(("zero3", *how) for how in (("off", 1), ("non-reentrant", 1), ("reentrant", 3))),
    *(("zero3-hpz", *how) for how in (("off", 1), ("reentrant", 3))),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Blocks that are larger than embedding and head together, and sizes that no number of ranks divides."""
    return save_odd(tmp_path_factory.mktemp("models"), "llama", layers=3)


@functools.cache
def counted(folder: str, preset: str, checkpointing: str, rounds: int) -> list[Any]:
    return run_on_ranks(RANKS, measured, folder, preset, checkpointing, rounds, "nf4")


@pytest.mark.parametrize(("preset", "checkpointing", "rounds"), CELLS)
def test_a_step_sends_what_the_formula_says(folder: str, preset: str, checkpointing: str, rounds: int) -> None:
    for found, formula, others in counted(folder, preset, checkpointing, rounds):
        assert found == formula
        assert len(others["small"]) == 1, "the norm of the gradient"
        frozen, weights = others["frozen"], found["weights"]["by_rank"]
        assert (weights == 0) == (preset < "zero3")
        assert weights < 2.1 * rounds * frozen, "once in forward and once in backward, whatever is recomputed"


def test_packed_bytes_stay_inside_a_node_where_there_are_second_shards(folder: str) -> None:
    plain = counted(folder, "zero3", "off", 1)[0][0]
    near = counted(folder, "zero3-hpz", "off", 1)[0][0]
    assert plain["weights"]["by_node"] == plain["weights"]["by_rank"] > 0 == near["weights"]["by_node"]
    assert near["gradients"] == plain["gradients"] and near["trained"] == plain["trained"]


def test_a_head_that_is_larger_than_a_block_is_gathered_once_and_the_last_block_twice(tmp_path: Path) -> None:
    """As at 70 billion parameters in 4 bits. Whether the norm before the head is kept is decided by what is fetched ahead."""
    folder = str(make_model(tmp_path / "model", layers=2))
    found, formula, _ = counted(folder, "zero3", "non-reentrant", 1)[0]
    norm = 4 * (32 // RANKS) * (RANKS - 1)
    assert formula["weights"]["by_rank"] - found["weights"]["by_rank"] in (0, norm)
    assert (found["gradients"], found["trained"]) == (formula["gradients"], formula["trained"])


# The formula alone.


def sizes(*blocks: int, head: int) -> Sizes:
    embedding, units = Unit(((head, 2),), in_backward=False), [Unit(((block - 8, 1), (8, 4)), 17) for block in blocks]
    return Sizes((embedding, *units, Unit(((4, 2),)), Unit(((head, 2),))), ((17,) * len(blocks),))


@pytest.mark.parametrize(
    ("head", "blocks", "heads", "norms"),
    [
        (1000, 2 * 3, 2, 2),  # a large head: it is kept from its forward to its backward, the block before it is not
        (46, 2 * 3, 2, 1),  # the norm lies within reach
        (8, 2 * 3 - 1, 2, 1),  # and the last block
    ],
)
def test_what_lies_within_a_blocks_elements_of_its_next_use_is_kept(
    head: int, blocks: int, heads: int, norms: int
) -> None:
    sent = step_traffic(sizes(96, 96, 96, head=head), 3, 2, 2)
    assert sent.weights.by_rank == (blocks * (88 + 32) + heads * 2 * head + norms * 8) // 2
    assert sent.weights.by_node == 0, "one node has no others"


SUM = 3 * 17 * 4  # bytes of three parameters of 17 elements


@pytest.mark.parametrize(
    ("stage", "gradients", "trained"),
    [
        (0, 2 * SUM * 7 // 8, 0),
        (1, 2 * SUM * 7 // 8, 64 * 4 * 7 // 8),  # together padded to a multiple of 16
        (2, 4 * (2 * SUM * 7 // 8), 64 * 4 * 7 // 8),
        (3, 4 * (3 * 24 * 4) * 7 // 8, 3 * 24 * 4 * 7 // 8),  # each to a multiple of 8
    ],
)
def test_gradients_are_summed_once_a_step_below_stage_2_and_once_a_micro_batch_from_there_on(
    stage: int, gradients: int, trained: int
) -> None:
    for ranks_per_node in (2, 4):
        sent = step_traffic(sizes(96, 96, 96, head=8), stage, 8, ranks_per_node, rounds=4)
        assert sent.gradients == Sent(gradients, gradients) and sent.trained == Sent(trained, trained)
    assert step_traffic(sizes(96, 96, 96, head=8), stage, 1, 1, rounds=4).total == Sent(0, 0)


def test_the_guides_example_is_what_the_formula_gives() -> None:
    assert "\n".join(example()) in (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
