"""Global batches are functions of the step: the same at every world size, always full, every sample in turn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace.errors import UsageError
from dist_subspace.training.data import Batches, BatchSettings, MicroBatch, TokenTable, eval_batches
from tests.training.data.tokens_for_tests import prepared


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    rows = [{"prompt": "p" * (i % 5 + 1), "completion": f"{i:02}" * (i % 3 + 1)} for i in range(23)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return prepared(tmp_path, train=str(tmp_path / "a.jsonl"), format="completion", max_length=32).train


def batches(table: TokenTable, **changed: Any) -> Batches:
    pad_id, rank, world_size = (
        changed.pop(name, value) for name, value in (("pad_id", 2), ("rank", 0), ("world_size", 1))
    )
    settings = BatchSettings(global_batch_size=5, micro_batch_size=1, seed=0, packing=False, max_length=32)
    return Batches(table, replace(settings, **changed), pad_id, rank, world_size)


def micros(table: TokenTable, step: int, world_size: int, **changed: Any) -> dict[int, MicroBatch]:
    found = {}
    for rank in range(world_size):
        for micro in batches(table, rank=rank, world_size=world_size, **changed).batch(step).rounds:
            if micro is not None:
                found[micro.number] = micro
    return found


def same(a: MicroBatch, b: MicroBatch) -> bool:
    tensors = all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs) and a.inputs.keys() == b.inputs.keys()
    counts = (a.number, a.targets, a.samples, a.tokens) == (b.number, b.targets, b.samples, b.tokens)
    return tensors and counts and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_are_the_same_on_any_number_of_ranks(table: TokenTable, packing: bool) -> None:
    size = {"global_batch_size": 3, "max_length": 24} if packing else {}
    for step in (0, 2, 7):
        alone = micros(table, step, 1, packing=packing, **size)
        for world_size in (2, 3):
            shared = micros(table, step, world_size, packing=packing, **size)
            assert alone.keys() == shared.keys()
            assert all(same(alone[number], shared[number]) for number in alone)


def test_five_micro_batches_on_two_ranks_are_rounds_of_two_two_and_one(table: TokenTable) -> None:
    first, second = (batches(table, rank=rank, world_size=2).batch(1) for rank in (0, 1))
    assert [micro and micro.number for micro in first.rounds] == [5, 7, 9]
    assert [micro and micro.number for micro in second.rounds] == [6, 8, None]
    assert second.filler.samples == 1 and second.filler.tokens == int(table.lengths.min())
    assert (first.targets, first.samples, first.tokens) == (second.targets, second.samples, second.tokens)
    assert first.targets == sum(m.targets for m in micros(table, 1, 2).values())


@pytest.mark.parametrize("packing", [False, True])
def test_every_batch_is_full_and_every_sample_comes_once_an_epoch(table: TokenTable, packing: bool) -> None:
    data = batches(table, packing=packing, global_batch_size=4, max_length=24)
    answers: Counter[tuple[int, ...]] = Counter()
    rows = sum(data.rows_per_epoch(epoch) for epoch in range(4))
    for step in range(rows // 4):
        batch = data.batch(step)
        assert len(batch.rounds) == 4 and None not in batch.rounds
        for micro in batch.rounds:
            assert micro is not None and micro.targets == int((micro.labels != -100).sum())
            answers.update(_samples(micro))
    assert len(answers) == len(table)
    # The last rows of the fourth epoch may stand in a batch that was not looked at.
    assert sum(answers.values()) >= 4 * len(table) - 4 * 24 // 4
    assert set(answers.values()) <= {3, 4}


def _samples(micro: MicroBatch) -> Iterator[tuple[int, ...]]:
    """The ids of each sample, found by the restart of positions."""
    mask = micro.inputs.get("attention_mask", torch.ones_like(micro.inputs["input_ids"])).bool()
    for ids, positions, real in zip(micro.inputs["input_ids"], micro.inputs["position_ids"], mask):
        ids, positions = ids[real], positions[real]
        edges = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in pairwise(edges):
            yield tuple(ids[start:end].tolist())


def test_steps_and_epochs_are_counted_in_rows(table: TokenTable) -> None:
    data = batches(table)
    assert data.rows_per_epoch(0) == 23 and data.steps_per_epoch == 23 / 5
    assert data.total_steps(1) == 5 and data.total_steps(2) == 10 and data.total_steps(0.01) == 1
    assert data.total_steps(5) == 23  # 115 rows are exactly 23 batches
    assert (
        batches(table, global_batch_size=1).total_steps(3.0000000000000004) == 69
    )  # the rounding of a product is no row
    assert data.batch(3).epoch == pytest.approx(20 / 23)
    assert data.batch(4).epoch == pytest.approx(1 + 2 / 23)
    assert data.batch(22).epoch == pytest.approx(5)


def test_a_batch_does_not_depend_on_which_were_asked_for_before(table: TokenTable) -> None:
    data = batches(table, packing=True, global_batch_size=2, max_length=24)
    forward = [data.batch(step) for step in range(12)]
    for step in (11, 0, 7):
        fresh = batches(table, packing=True, global_batch_size=2, max_length=24).batch(step)
        assert all(a and b and same(a, b) for a, b in zip(forward[step].rounds, fresh.rounds))


def test_a_packed_row_restarts_positions_and_has_no_target_across_a_border(table: TokenTable) -> None:
    batch = batches(table, packing=True, global_batch_size=2, micro_batch_size=2, max_length=24).batch(0)
    (micro,) = batch.rounds
    assert micro is not None and "attention_mask" not in micro.inputs
    starts = micro.inputs["position_ids"] == 0
    assert int(starts.sum()) >= micro.samples > 2
    assert (micro.labels[starts] == -100).all()
    assert micro.targets == batch.targets == int((micro.labels != -100).sum())


def test_padding_of_packed_rows_is_a_segment_of_its_own(table: TokenTable) -> None:
    data = batches(table, packing=True, global_batch_size=2, micro_batch_size=2, max_length=24, pad_to_multiple=32)
    micro = data.batch(0).rounds[0]
    assert micro is not None and micro.inputs["input_ids"].shape == (2, 32)
    for ids, positions, labels in zip(micro.inputs["input_ids"], micro.inputs["position_ids"], micro.labels):
        pad = int((positions == 0).nonzero()[-1])
        assert (ids[pad:] == 2).all() and (labels[pad:] == -100).all()
        assert positions[pad:].tolist() == list(range(32 - pad))


def test_kernel_lengths_count_segments_over_flattened_rows(table: TokenTable) -> None:
    data = batches(table, packing=True, global_batch_size=2, micro_batch_size=2, max_length=24, segment_lengths=True)
    micro = data.batch(0).rounds[0]
    assert micro is not None
    edges = micro.inputs["cu_seq_lens_q"]
    assert edges.dtype == torch.int32 and edges[0] == 0 and edges[-1] == micro.inputs["input_ids"].numel()
    flat = micro.inputs["position_ids"].reshape(-1)
    assert (flat[edges[:-1].long()] == 0).all() and int((flat == 0).sum()) == len(edges) - 1
    assert micro.inputs["max_length_q"] == int(edges.diff().max()) == int(flat.max()) + 1


def test_padding_is_masked_by_length_on_either_side_also_where_its_id_is_in_the_text(table: TokenTable) -> None:
    for side in ("right", "left"):
        data = batches(table, global_batch_size=5, micro_batch_size=5, padding_side=side, pad_id=1)
        micro = data.batch(0).rounds[0]
        assert micro is not None
        mask = micro.inputs["attention_mask"]
        assert int(mask.sum()) == micro.tokens
        assert (micro.labels[mask == 0] == -100).all()
        assert int((micro.labels == 1).sum()) == 5  # every answer's end of sequence is still a target
        assert (micro.inputs["position_ids"].max(1).values + 1 == mask.sum(1)).all()


def test_too_few_rows_are_refused(table: TokenTable) -> None:
    with pytest.raises(UsageError, match="global_batch_size is 24, but the data has 23 samples"):
        batches(table, global_batch_size=24)
    with pytest.raises(UsageError, match="packed rows"):
        batches(table, global_batch_size=23, packing=True, max_length=32)


def test_evaluation_sees_every_sample_once_in_equally_many_rounds_on_every_rank(table: TokenTable) -> None:
    for world_size in (1, 2, 3):
        ranks = [
            list(eval_batches(table, rank=rank, world_size=world_size, micro_batch_size=4, pad_id=2))
            for rank in range(world_size)
        ]
        assert len({len(rounds) for rounds in ranks}) == 1
        found = [micro for rounds in ranks for micro in rounds if micro is not None]
        assert sum(micro.samples for micro in found) == 23
        assert sum(micro.targets for micro in found) == int(table.target_counts.sum())


def test_classification_gives_class_ids_and_counts_samples(tmp_path: Path) -> None:
    rows = [{"text": "t" * (i + 1), "label": i % 2} for i in range(4)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = prepared(tmp_path, train=str(tmp_path / "c.jsonl"), format="classification").train
    micro = batches(table, global_batch_size=4, micro_batch_size=4).batch(0).rounds[0]
    assert micro is not None and micro.inputs.keys() == {"input_ids", "attention_mask"}
    assert micro.labels.shape == (4,) and sorted(micro.labels.tolist()) == [0, 0, 1, 1] and micro.targets == 4


@pytest.mark.parametrize(("packing", "micro_batch_size"), [(False, 1), (False, 4), (True, 1), (True, 2)])
def test_a_batch_of_all_rows_is_the_largest_that_works_and_loses_no_sample(
    table: TokenTable, packing: bool, micro_batch_size: int
) -> None:
    options = {"packing": packing, "max_length": 32, "micro_batch_size": micro_batch_size}
    every = batches(table, global_batch_size=None, **options)
    size, rows = every.global_batch_size, every.rows_per_epoch(0)
    assert rows - micro_batch_size < size <= rows and size % micro_batch_size == 0
    with pytest.raises(UsageError, match=f"accepted: at most {size}, or null for all of them"):
        batches(table, global_batch_size=size + micro_batch_size, **options)
    same = batches(table, global_batch_size=size, **options)
    assert [m.inputs["input_ids"].tolist() for m in every.batch(0).rounds if m is not None] == [
        m.inputs["input_ids"].tolist() for m in same.batch(0).rounds if m is not None
    ]
    steps = every.total_steps(1)
    assert sum(every.batch(step).samples for step in range(steps)) >= len(table)


def test_fewer_rows_than_a_micro_batch_are_refused(table: TokenTable) -> None:
    with pytest.raises(
        UsageError, match="per_device_train_batch_size is 24, but the data has 23 samples; accepted: at most"
    ):
        batches(table, global_batch_size=None, micro_batch_size=24)
