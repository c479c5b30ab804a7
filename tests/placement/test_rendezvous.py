"""The ranks meet, or one of them says why they do not, once, and none waits without an end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.forked_ranks import Ended, report, run_ranks
from tests.ranks import free_port


def meets(variables: dict[str, str], patience: float, package: str) -> None:
    """One process: what a run does first, with these variables of a launcher."""
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    os.environ |= variables
    from dist_subspace.errors import UsageError
    from dist_subspace.launchers import enter
    from dist_subspace.placement.rendezvous import RefusedElsewhere, met

    try:
        with met(enter(), patience, {"package": package}):
            dist.init_process_group("gloo")
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, dist.get_rank())
            print(*ranks)
            dist.destroy_process_group()
    except RefusedElsewhere:
        sys.exit(3)
    except UsageError as error:
        print(f"error: {error}")
        sys.exit(2)


def meet(
    folder: Path, *ranks: str, size: int, packages: dict[int, str] | None = None, patience: float = 60.0
) -> list[Ended]:
    """How each process ended; `packages`: what a process, by its place among them, has instead of "a"."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    calls = [
        (meets, common | {"RANK": rank, "LOCAL_RANK": rank}, patience, (packages or {}).get(place, "a"))
        for place, rank in enumerate(ranks)
    ]
    return run_ranks(calls, folder)


def the_sentence(ended: list[Ended]) -> str:
    """One rank spoke, in one line; all have left."""
    assert sorted(rank.status or 0 for rank in ended) == [2, *[3] * (len(ended) - 1)], report(ended)
    lines = [line for rank in ended for line in rank.errors]
    assert len(lines) == 1, report(ended)
    return lines[0].removeprefix("error: ")


def test_ranks_that_meet_make_their_process_group_at_the_same_address(tmp_path: Path) -> None:
    ended = meet(tmp_path, "0", "1", "2", size=3)
    assert [(rank.status, rank.output) for rank in ended] == [(0, "0 1 2\n")] * 3, report(ended)


def test_two_processes_with_one_number_are_named(tmp_path: Path) -> None:
    sentence = the_sentence(meet(tmp_path, "0", "1", "1", size=3))
    assert sentence.startswith("two processes are rank 1 of 3: ") and "accepted: one process a rank" in sentence


def test_a_rank_that_does_not_come_is_named_once_the_patience_is_over(tmp_path: Path) -> None:
    sentence = the_sentence(meet(tmp_path, "0", "1", size=3, patience=6.0))
    assert (
        sentence.startswith("rank 2 of 3 did not come to 127.0.0.1:") and "in 6 seconds; here: rank 0 on " in sentence
    )


def test_a_node_with_another_package_is_named_before_anything_else_is_done(tmp_path: Path) -> None:
    sentence = the_sentence(meet(tmp_path, "0", "1", "2", size=3, packages={1: "b"}))
    assert (
        "(rank 1, " in sentence and "has another package than " in sentence and ": b, and not a; accepted: " in sentence
    )
