"""Every storage x method x ZeRO stage x ranks x layer kind, generated from the registries: a new file is covered at once.

By default a covering sample (every pair of values of two axes), one process group for each number of ranks; the product is
slow.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_subspace import methods
from dist_subspace.linear_map import product_type
from dist_subspace.storage import storages
from dist_subspace.subspace import method_class
from dist_subspace.subspace.core.schedule import late_factors_of
from tests.matrix import tiny
from tests.matrix.cells import Cell, Reference, Seen, all_cells, covering, reference, run_cells
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd

ALL = all_cells(list(storages()), list(methods()))
WIDTHS = ("bf16", "int8", "nf4")
# What other tools refuse or get wrong (docs/failures.md, "PiSSA decomposes an empty or a packed weight", and docs/failures.md,
# "DoRA fails on split 4-bit weights").
TWO = [c for c in ALL if c.ranks == 2 and not c.reentrant]
SHARDED_SVD = [
    c for c in TWO if (c.method, c.family, c.double_quant) == ("pissa", "llama", False) and c.storage in WIDTHS
]
SHARDED_DORA = [c for c in TWO if (c.method, c.stage) == ("dora", 3) and c.storage in ("nf4", "fp4")]
SAMPLE = covering(ALL, [*SHARDED_SVD, *SHARDED_DORA])
LOSS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative
# Relative to the parameter's largest; float16 runs without a loss scaler here, and the smallest gradients are subnormal numbers:
# more of them where the machine multiplies float16 itself, so that activations are rounded too (measured: up to 6.5e-2).
NATIVE_FLOAT16 = product_type(torch.zeros(1, dtype=torch.float16)) == torch.float16
GRADIENT = {torch.float32: 1e-3, torch.float16: 1e-1 if NATIVE_FLOAT16 else 5e-2, torch.bfloat16: 3e-1}
OUTPUT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # absolute, of logits of size 1

AT_ONCE = 16  # cells of one call: few enough for a test's time limit on a busy machine, enough to share the call

_seen: dict[Cell, list[Seen]] = {}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("matrix")
    for family in ("llama", "gpt2"):
        save_odd(folder, family)
    yield folder
    _seen.clear()
    _reference.cache_clear()


@functools.lru_cache(maxsize=256)
def _reference(cell: Cell, folder: Path) -> Reference:
    return reference(cell, folder)


def seen_of(cell: Cell, cells: list[Cell], folder: Path) -> list[Seen]:
    """What each rank saw of a cell; the first question runs it and its neighbours in the process group of its size."""
    if cell not in _seen:
        alike = [other for other in cells if other.ranks == cell.ranks]
        begin = alike.index(cell) // AT_ONCE * AT_ONCE
        group = [other for other in alike[begin : begin + AT_ONCE] if other not in _seen]
        ranks = run_on_ranks(cell.ranks, run_cells, group, str(folder), tempfile.mkdtemp(dir=folder), timeout=480)
        _seen.update({other: [rank[i] for rank in ranks] for i, other in enumerate(group)})
    return _seen[cell]


def check(cell: Cell, cells: list[Cell], folder: Path) -> None:
    ranks = seen_of(cell, cells, folder)
    for seen in ranks:
        assert seen.error is None, seen.error
        if methods()[cell.method].identity:
            assert seen.start_difference == 0, "attached, the model is not its base"
        assert seen.frozen_unchanged, "a frozen weight changed"
        assert seen.unmoved == [], "trained parameters that did not move"
        assert seen.broken == 0, "a frozen weight was not whole where it was used"
        assert seen.backwards > 0 and seen.forwards > seen.backwards, "no product was seen"
        assert seen.round_trip and seen.reload_difference <= OUTPUT[cell.dtype]
        assert seen.merge_difference <= OUTPUT[cell.dtype], "the merged model says something else"
        assert seen.state_restored, "optimizer state did not come back"
    check_gradients(cell, ranks, folder)
    check_losses(cell, ranks, folder)
    check_bytes(cell, ranks)


def _alike(cell: Cell) -> Cell:
    return Cell(cell.storage, cell.double_quant, cell.method, 0, 1, cell.family, False)


def check_gradients(cell: Cell, ranks: list[Seen], folder: Path) -> None:
    """Of the last step: the mean over the ranks is the dense formula's gradient, for every trained parameter."""
    right = _reference(_alike(cell), folder)
    expected = right.gradients
    assert ranks[0].gradients.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        part, _, own = name.rpartition(".")
        if own in late_factors_of(method_class(cell.method)) and cell.dtype != torch.float32:
            # Each side found its directions by itself in the middle of the run, and in 16 bits near ties fall otherwise:
            # u_i · (∂W v_i) is the gradient along those that the run has.
            u, v = (t.double() for t in ranks[0].directions[part])
            gradient = ((u.t() @ right.weight_gradients[part]) * v).sum(1)
        mean = sum(seen.gradients[name].double() for seen in ranks) / len(ranks)
        scale = max(float(gradient.abs().max()), 0.01 * largest)
        assert float((mean - gradient).abs().max()) <= GRADIENT[cell.dtype] * scale, name


def check_losses(cell: Cell, ranks: list[Seen], folder: Path) -> None:
    rows = _reference(_alike(cell), folder).losses
    share = tiny.BATCH // cell.ranks
    for number, seen in enumerate(ranks):
        expected = [sum(step[number * share : (number + 1) * share]) / share for step in rows]
        assert seen.losses == pytest.approx(expected, rel=LOSS[cell.dtype])


def check_bytes(cell: Cell, ranks: list[Seen]) -> None:
    """Under ZeRO-3 a rank keeps ceil(n / ranks) of every frozen parameter after a step, and never holds all at once."""
    for seen in ranks:
        if cell.stage < 3:
            assert seen.resident == seen.whole
            continue
        assert seen.not_split == [] and seen.wrong_shards == []
        assert seen.resident == seen.shards
        if cell.ranks > 1:
            assert seen.shards < 0.52 * seen.whole
            assert seen.shards < seen.peak < seen.whole


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_a_cell_of_the_covering_sample_trains_as_dense_weights_do(cell: Cell, models: Path) -> None:
    check(cell, SAMPLE, models)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ALL, ids=str)
def test_a_cell_of_the_full_product_trains_as_dense_weights_do(cell: Cell, models: Path) -> None:
    check(cell, ALL, models)


@pytest.mark.parametrize("cell", SHARDED_SVD, ids=str)
def test_pissa_starts_at_its_base_at_every_stage_in_16_8_and_4_bits(cell: Cell, models: Path) -> None:
    check(cell, SAMPLE, models)
    assert all(seen.start_difference == 0 for seen in seen_of(cell, SAMPLE, models))


@pytest.mark.parametrize("cell", SHARDED_DORA, ids=str)
def test_dora_on_split_4_bit_weights_is_dora_on_dense_ones(cell: Cell, models: Path) -> None:
    check(cell, SAMPLE, models)


def test_every_frozen_parameter_is_partitioned_to_the_expected_shard(models: Path) -> None:
    split = [cell for cell in SAMPLE if cell.stage == 3 and cell.ranks == 2]
    assert {cell.storage for cell in split} == set(storages())
    for cell in split:
        for seen in seen_of(cell, SAMPLE, models):
            assert seen.error is None and seen.not_split == [] and seen.wrong_shards == []


def test_no_rank_holds_a_whole_int8_matrix_after_a_step(models: Path) -> None:
    split = [cell for cell in SAMPLE if cell.storage == "int8" and cell.stage == 3 and cell.ranks == 2]
    assert split
    for cell in split:
        for seen in seen_of(cell, SAMPLE, models):
            assert seen.error is None and seen.whole_int8 == []
            assert seen.resident == seen.shards < 0.52 * seen.whole
    replicated = next(cell for cell in SAMPLE if cell.storage == "int8" and cell.stage < 3)
    assert seen_of(replicated, SAMPLE, models)[0].whole_int8, "the search finds whole matrices where there are some"


def test_the_covering_sample_holds_every_storage_and_method_at_every_placement() -> None:
    placements = {(cell.stage, cell.ranks) for cell in ALL}
    for name in storages():
        assert {(c.stage, c.ranks) for c in SAMPLE if c.storage == name} == placements
    for name in methods():
        assert {(c.stage, c.ranks) for c in SAMPLE if c.method == name} == placements
