"""Bytes of a step, counted in the collectives of real ranks, are those of the formula, to the byte: four ranks on two nodes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace.placement.engines import IN_PIECES, LOOKED_UP
from dist_subspace.placement.traffic import Sent, Sizes, Unit, step_traffic
from tests.benchmarks.traffic import RANKS, example, measured
from tests.ranks import ROOT, run_on_ranks
from tests.tables_in_place import from_the_first_byte
from tests.tiny_models import save_odd, tiny_model
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


def in_place(folder: str, preset: str, ids: Tensor) -> tuple[dict[str, Any], ...]:
    with from_the_first_byte(piece=640):
        return measured(folder, preset, "off", 1, "nf4", ids)


@pytest.mark.parametrize("width", [32, 40])
@pytest.mark.parametrize("preset", ["zero3", "zero3-hpz"])
def test_rows_of_a_large_table_are_sent_to_who_asks_and_a_large_head_once(
    preset: str, width: int, tmp_path: Path
) -> None:
    """Each rank asks each for eight rows. At a width of 40 shards cut a row, which nobody asks for."""
    vocabulary = 64 if width == 32 else 63
    model = tiny_model(vocab_size=vocabulary, tie_word_embeddings=False, hidden_size=width)
    model.save_pretrained(tmp_path)
    ids = torch.stack(
        [torch.tensor([16 * part + (rank + n) % 15 for part in range(4) for n in range(8)]) for rank in range(4)]
    )
    for found, formula, _ in run_on_ranks(RANKS, in_place, str(tmp_path), preset, ids):
        assert found == formula
        assert found["weights"]["by_rank"] > 0
        assert (found["weights"]["by_node"] == 0) == (preset == "zero3-hpz")


def test_a_head_that_is_larger_than_a_block_is_gathered_once(tmp_path: Path) -> None:
    """As at 70 billion parameters in 4 bits."""
    folder = str(make_model(tmp_path / "model", layers=2))
    found, formula, _ = counted(folder, "zero3", "non-reentrant", 1)[0]
    assert found == formula


# The formula alone.


def sizes(*blocks: int, head: int) -> Sizes:
    embedding, units = Unit(((head, 2),), in_backward=False), [Unit(((block - 8, 1), (8, 4)), 17) for block in blocks]
    return Sizes((embedding, *units, Unit(((4, 2),)), Unit(((head, 2),), in_backward=False)), ((17,) * len(blocks),))


def test_blocks_and_norms_are_sent_for_forward_and_for_backward_embedding_and_head_once() -> None:
    sent = step_traffic(sizes(96, 96, 96, head=1000), 3, 2, 2)
    assert sent.weights.by_rank == (2 * 3 * (88 + 32) + 2 * 2 * 1000 + 2 * 8) // 2
    assert sent.weights.by_node == 0, "one node has no others"


def test_a_table_is_sent_by_its_rows_and_a_head_in_pieces_of_whole_rows() -> None:
    table = Unit(((1000, 2),), in_backward=False, use=LOOKED_UP, width=10)
    head = Unit(((1000, 2),), in_backward=False, use=IN_PIECES, width=10)
    one, other = (step_traffic(Sizes((unit,), ()), 3, 4, 2, tokens=40).weights for unit in (table, head))
    assert one.by_rank == 30 * (4 + 20), "ids and rows of three quarters of the tokens"
    assert other.by_rank == 3 * 25 * 20, "one piece, a quarter of the rows each"


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
