"""Ranks as their launchers lay them on nodes, and whole runs whose weights are split inside nodes: four ranks on two nodes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.placement.nodes import Seat, alike
from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.training.run import train
from tests.keys.watch import watched
from tests.ranks import run_on_ranks
from tests.tiny_run import make_model, make_records
from tests.whole_runs import assert_same, configuration, losses

RANKS, NODE = 4, 2


def seats(*standing: tuple[int, int | None]) -> list[Seat]:
    """(number on its node, ranks there) of each rank."""
    return [Seat(f"node{rank}", local, size) for rank, (local, size) in enumerate(standing)]


def test_nodes_of_one_size_whose_ranks_follow_one_another_have_that_size() -> None:
    assert alike("zero3-hpz", seats((0, 2), (1, 2), (0, 2), (1, 2))) == 2
    assert alike("zero3-hpz", seats(*((n % 8, 8) for n in range(24)))) == 8


@pytest.mark.parametrize(
    ("standing", "reason"),
    [
        ([(0, 2), (1, 2)], "the whole run is on one node, where second shards would take memory and save nothing"),
        ([(0, None)], "the whole run is on one node"),
        ([(0, 1), (0, 1)], "each node has one rank, which would keep all weights; accepted: zero3, or zero2"),
        ([(0, 2), (1, 2), (0, 1)], "rank 2 on node2 is one of 1, and rank 0 on node0 one of 2"),
        (
            [(0, 2), (0, 2), (1, 2), (1, 2)],
            "rank 1 on node1 is number 0 of 2 there; accepted: srun --distribution=block",
        ),
        ([(0, 2), (1, 2), (0, None), (1, None)], "rank 2 on node2 does not say how many .* accepted: LOCAL_WORLD_SIZE"),
        ([(0, None), (0, None)], "rank 0 on node0 does not say"),
        ([(0, 2), (1, 2), (0, 2)], "3 ranks are no whole number of nodes of 2"),
    ],
)
def test_what_second_shards_cannot_be_split_over_is_refused(
    standing: list[tuple[int, int | None]], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        alike("zero3-hpz", seats(*standing))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("deepspeed.preset is 'zero3-hpz', ")


# Whole runs.


def run_as_nodes(config: dict[str, Any], node: int | None) -> tuple[int, int]:
    """(exit status, ranks that second shards are split over), on nodes of so many ranks."""
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    if node is not None:
        os.environ |= {"LOCAL_WORLD_SIZE": str(node), "LOCAL_RANK": str(world().rank % node)}
    with watched() as seen:
        status = train(config)
    return status, seen.engines[-1].zero_hpz_partition_size() if seen.engines else 0


def trained(folder: Path, run: Path, deepspeed: dict[str, Any], ranks: int, node: int | None, expect: int) -> Path:
    config = configuration(folder, run) | {"deepspeed": deepspeed}
    config["model"]["storage"] = "nf4"
    config["data"]["cache_dir"] = str(folder / "tokens")
    assert run_on_ranks(ranks, run_as_nodes, config, node) == [(EXIT_OK, expect)] * ranks
    return run


def test_a_run_with_second_shards_is_zero_3s_and_goes_on_as_any_other(tmp_path: Path) -> None:
    """To zero3, to another number of ranks, and back; from a preset and from a stock JSON."""
    make_model(tmp_path / "model")
    make_records(tmp_path / "train.jsonl", 20)
    near, plain = {"preset": "zero3-hpz"}, {"preset": "zero3"}
    stock = {"config": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": NODE}}}
    whole = trained(tmp_path, tmp_path / "near", near, RANKS, NODE, NODE)
    same = [
        trained(tmp_path, tmp_path / "plain", plain, RANKS, NODE, 1),
        trained(tmp_path, tmp_path / "stock", stock, RANKS, None, NODE),
    ]
    for name, deepspeed, ranks in (("plain", near, RANKS), ("near", plain, 2)):
        run = tmp_path / f"{name}-{len(same)}"
        shutil.copytree(tmp_path / name, run)
        for later in ("checkpoint-6", "adapter"):
            shutil.rmtree(run / later)
        trained(tmp_path, run, deepspeed, ranks, NODE, NODE if deepspeed is near else 1)
        if ranks == RANKS:
            same.append(run)
        assert losses(run)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-3)
    for run in same:
        assert losses(run) == losses(whole)
        assert_same(run / "adapter" / "adapter_model.safetensors", whole / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("node", "reason"), [(RANKS, "one node"), (1, "each node has one rank"), (None, "does not say")]
)
def test_a_run_that_cannot_have_second_shards_is_refused_on_every_rank(
    tmp_path: Path, node: int | None, reason: str
) -> None:
    config = configuration(tmp_path, tmp_path / "run") | {"deepspeed": {"preset": "zero3-hpz"}}
    assert run_on_ranks(RANKS, run_as_nodes, config, node) == [(EXIT_USAGE, 0)] * RANKS
    assert reason in (read_status(tmp_path / "run") or {})["message"]
