"""Where a run is, in a line for one process; those of several ranks are in tests/faults/test_lost_ranks.py."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from dist_subspace.config import load_config
from dist_subspace.launchers import enter
from dist_subspace.training.whereabouts import has_screen_of_its_own, ranks_text, started_by, whereabouts

BASE = {"model": {"path": "m", "storage": "nf4"}, "data": {"train": "t"}, "run": {"output_dir": "/runs/a"}}


def test_one_process_is_one_line() -> None:
    (line,) = whereabouts(load_config(BASE, ["deepspeed.preset=none"]))
    host = os.uname().nodename
    assert line.startswith(f"1 process on {host} (") and line.endswith("; weights nf4, preset none; run folder /runs/a")
    stock = load_config({**BASE, "deepspeed": {"config": {"zero_optimization": {"stage": 2}}}})
    assert "ZeRO stage 2 by deepspeed.config" in whereabouts(stock)[0]


SRUN = {
    **{
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
    },
    **{"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7"},
}
HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "launcher", "own_screen"),
    [
        (SRUN, "srun", False),
        (HAND, "RANK and WORLD_SIZE", True),
        (HAND | {"TORCHELASTIC_RUN_ID": "a", "LOCAL_RANK": "0"}, "torchrun", True),
    ],
)
def test_the_launcher_is_named_as_it_was_before_its_place_was_entered(
    variables: dict[str, str], launcher: str, own_screen: bool
) -> None:
    entered = dict(variables)
    enter(entered)
    assert started_by(variables) == started_by(entered) == launcher
    assert has_screen_of_its_own(entered) == own_screen


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        ({"a": 8}, "8 ranks on 1 node, 8 on a"),
        ({"a": 2, "b": 2}, "4 ranks on 2 nodes, 2 on each of a, b"),
        ({"a": 2, "b": 1}, "3 ranks on 2 nodes, 2 on a, 1 on b"),
        (
            {f"n{number}": 8 for number in range(10)},
            "80 ranks on 10 nodes, 8 on each of n0, n1, n2, n3, n4, n5, n6, n7 and 2 more",
        ),
    ],
)
def test_ranks_are_counted_by_their_nodes(hosts: dict[str, int], text: str) -> None:
    assert ranks_text(Counter(hosts)) == text
