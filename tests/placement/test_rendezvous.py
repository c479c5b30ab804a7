"""The ranks meet, or one of them says why they do not, once, and none waits without an end."""

from __future__ import annotations

import subprocess
import sys

from tests.ranks import ROOT, free_port, outside_ranks

MEET = """
import os, sys
from dist_subspace.errors import UsageError
from dist_subspace.launchers import enter
from dist_subspace.placement.rendezvous import RefusedElsewhere, met

try:
    with met(enter(), float(os.environ["PATIENCE"]), {"package": os.environ["PACKAGE"]}):
        import torch.distributed as dist
        dist.init_process_group("gloo")
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, dist.get_rank())
        print(*ranks)
        dist.destroy_process_group()
except RefusedElsewhere:
    sys.exit(3)
except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def meet(
    *ranks: str, size: int, packages: dict[int, str] | None = None, patience: float = 60.0
) -> list[tuple[int, str, str]]:
    """Exit status and output of each process; `packages`: what a process, by its place among them, has instead of "a"."""
    common = outside_ranks() | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "PATIENCE": str(patience), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET],
            env=common | {"RANK": rank, "LOCAL_RANK": rank, "PACKAGE": (packages or {}).get(place, "a")},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            text=True,
        )
        for place, rank in enumerate(ranks)
    ]
    said = [process.communicate(timeout=180) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, said, strict=True)]


def the_sentence(ended: list[tuple[int, str, str]]) -> str:
    """One rank spoke, in one line; all have left."""
    assert sorted(status for status, _, _ in ended) == [2, *[3] * (len(ended) - 1)], ended
    lines = "".join(err for _, _, err in ended).splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_ranks_that_meet_make_their_process_group_at_the_same_address() -> None:
    assert [(status, out) for status, out, _ in meet("0", "1", "2", size=3)] == [(0, "0 1 2\n")] * 3


def test_two_processes_with_one_number_are_named() -> None:
    sentence = the_sentence(meet("0", "1", "1", size=3))
    assert sentence.startswith("two processes are rank 1 of 3: ") and "accepted: one process a rank" in sentence


def test_a_rank_that_does_not_come_is_named_once_the_patience_is_over() -> None:
    sentence = the_sentence(meet("0", "1", size=3, patience=15.0))
    assert (
        sentence.startswith("rank 2 of 3 did not come to 127.0.0.1:") and "in 15 seconds; here: rank 0 on " in sentence
    )


def test_a_node_with_another_package_is_named_before_anything_else_is_done() -> None:
    sentence = the_sentence(meet("0", "1", "2", size=3, packages={1: "b"}))
    assert (
        "(rank 1, " in sentence and "has another package than " in sentence and ": b, and not a; accepted: " in sentence
    )
