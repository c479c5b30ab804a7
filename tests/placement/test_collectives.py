"""Ranks decide alike: an error of one is everyone's, and what is sent arrives exactly."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.placement import collectives
from dist_subspace.placement.collectives import (
    agreed,
    all_here,
    broadcast_tensors,
    on_main,
    refuse_unlike,
    tell_peers,
    wait_until_told,
    world,
)
from tests.named_hosts import named_host
from tests.ranks import run_on_ranks, run_once_on_ranks


def fail_on(rank: int, usage: bool) -> None:
    if world().rank == rank:
        raise UsageError("a bad value") if usage else RuntimeError("a broken disk")


def caught(block: Any, *args: Any) -> tuple[str, str]:
    """The error's type and text, and proof that the group still works: a collective follows."""
    try:
        block(*args)
    except Exception as error:
        found = (type(error).__name__, str(error))
    else:
        found = ("none", "")
    assert collectives.gather_objects(world().rank) == list(range(world().size))
    return found


def agreed_block(rank: int, usage: bool) -> None:
    with agreed("reading"):
        fail_on(rank, usage)


def errors_of_agreed(rank: int, usage: bool) -> tuple[str, str]:
    return caught(agreed_block, rank, usage)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_usage_error_of_one_rank_is_the_same_error_on_all(rank: int) -> None:
    assert run_on_ranks(2, errors_of_agreed, rank, True) == [("UsageError", "a bad value")] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_another_error_stays_itself_where_it_happened_and_is_named_elsewhere(rank: int) -> None:
    found = run_on_ranks(2, errors_of_agreed, rank, False)
    assert found[rank] == ("RuntimeError", "a broken disk")
    assert found[1 - rank] == ("PeerFailed", f"reading failed on rank {rank}: a broken disk")


def test_a_block_that_no_rank_fails_in_passes() -> None:
    assert run_on_ranks(2, errors_of_agreed, 5, True) == [("none", "")] * 2


def errors_on_hosts(rank: int, hosts: list[str]) -> list[str]:
    """What `agreed`, `on_main` and `refuse_unlike` say where the ranks stand on these hosts, and the rank does not like it."""
    here = hosts[world().rank]
    with named_host(here):
        found = [errors_of_agreed(rank, True)[1], errors_of_on_main(True)[1]]
        return [*found, caught(refuse_unlike, {"disk": "large" if world().rank == rank else "small"})[1]]


def test_a_refusal_that_is_not_true_on_every_host_names_the_host() -> None:
    apart = ["on node2 (rank 1): a bad value", "on node1 (rank 0): a bad value"]
    other = "rank 1 on node2 has another disk than rank 0 on node1: 'large', and not 'small'; accepted: the same files and the "
    for said in run_on_ranks(2, errors_on_hosts, 1, ["node1", "node2"]):
        assert said == [*apart, other + "same command for every rank"]
    for said in run_on_ranks(2, errors_on_hosts, 1, ["node1", "node1"]):
        assert said[:2] == ["a bad value"] * 2 and said[2].startswith("rank 1 has another disk than rank 0: 'large'")


def errors_of_on_main(usage: bool) -> tuple[str, str]:
    return caught(on_main, fail_on, 0, usage)


def test_an_error_on_the_main_rank_is_everyones() -> None:
    assert run_on_ranks(2, errors_of_on_main, True) == [("UsageError", "a bad value")] * 2
    kinds = [kind for kind, _ in run_on_ranks(2, errors_of_on_main, False)]
    assert kinds == ["RuntimeError", "PeerFailed"]


def results_of_on_main() -> tuple[int, list[int]]:
    ran: list[int] = []

    def work() -> int:
        ran.append(world().rank)
        return 41 + world().size

    return on_main(work), ran


def test_the_main_ranks_result_is_everyones_and_the_others_do_not_run() -> None:
    assert run_on_ranks(2, results_of_on_main) == [(43, [0]), (43, [])]


def fail_once_a_node() -> tuple[str, str]:
    return caught(collectives.once_per_node, fail_on, 0, True)


def test_an_error_of_the_rank_that_works_for_its_node_is_everyones() -> None:
    assert run_on_ranks(2, fail_once_a_node) == [("UsageError", "a bad value")] * 2


def ranks_that_work(ranks_of_a_node: int) -> list[int]:
    """Of two ranks that stand on nodes of so many, by the launcher's variable."""
    before, ran = os.environ["LOCAL_RANK"], list[int]()
    os.environ["LOCAL_RANK"] = str(world().rank % ranks_of_a_node)
    collectives.once_per_node(ran.append, world().rank)
    os.environ["LOCAL_RANK"] = before
    return ran


def test_the_first_rank_of_every_node_works_for_its_node() -> None:
    assert run_on_ranks(2, ranks_that_work, 2) == [[0], []]
    assert run_on_ranks(2, ranks_that_work, 1) == [[0], [1]]


def tensors_to_send() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).to(torch.bfloat16),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "turned": torch.randn(3, 4, generator=generator).t(),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def received_equals_sent() -> dict[str, bool]:
    received = broadcast_tensors(tensors_to_send() if world().is_main else None)
    sent = tensors_to_send()
    assert list(received) == list(sent)
    return {name: same_bytes(received[name], sent[name]) for name in sent}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and one.reshape(-1).view(torch.uint8).tolist() == other.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_broadcast_tensors_arrive_bit_for_bit(ranks: int) -> None:
    for rank in run_on_ranks(ranks, received_equals_sent):
        assert all(rank.values()), rank


def small_answers() -> list[Any]:
    rank = world().rank
    return [
        collectives.any_rank(rank == 1),
        collectives.any_rank(False),
        collectives.max_over_ranks(float(rank)),
        collectives.sum_over_ranks([1.0, rank + 0.1]),
        collectives.broadcast_object({"from": rank}),
        collectives.broadcast_object(rank, source=world().size - 1),
        collectives.gather_objects(rank * 10),
        collectives.sum_over_ranks([2.0**24 + 1])[0] - 2.0**24,  # tokens of a long run, which float32 cannot count
        collectives.largest_over_ranks([float(rank), -2.0 - rank]),
    ]


def test_small_questions_have_the_same_answer_on_every_rank() -> None:
    expected = [True, False, 1.0, pytest.approx([2.0, 1.2]), {"from": 0}, 1, [0, 10], 2.0**24 + 2, [1.0, -2.0]]
    assert run_on_ranks(2, small_answers) == [expected, expected]


def test_without_a_process_group_a_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert small_answers() == [False, False, 0.0, pytest.approx([1.0, 0.1]), {"from": 0}, 0, [0], 1.0, [0.0, -2.0]]
    assert broadcast_tensors({"a": torch.ones(2)})["a"].tolist() == [1.0, 1.0]
    assert caught(on_main, fail_on, 0, True) == ("UsageError", "a bad value")


def meet_alone_then_together(lonely: int) -> tuple[str, str]:
    found = ("none", "")
    if world().rank == lonely:
        try:
            all_here("merge", patience=0.5)
        except UsageError as error:
            found = ("UsageError", str(error))
    all_here("merge", patience=60)
    assert collectives.gather_objects(world().rank) == list(range(world().size))
    return found


@pytest.mark.parametrize("lonely", [0, 1])
def test_a_rank_that_calls_alone_is_told_who_is_missing_and_a_later_call_of_all_goes_on(lonely: int) -> None:
    found = run_on_ranks(2, late_for_one, lonely)
    assert found[1 - lonely] == ("none", "")
    kind, text = found[lonely]
    assert kind == "UsageError"
    assert f"merge was called by rank {lonely} of 2, and in 0.5 seconds not by rank {1 - lonely}" in text


def late_for_one(lonely: int) -> tuple[str, str]:
    if world().rank != lonely:
        time.sleep(2)
    return meet_alone_then_together(lonely)


def waited_for_rank_0(seconds: float, patience: float) -> tuple[float, int | None]:
    collectives.barrier()
    began, told = time.monotonic(), None
    if world().is_main:
        time.sleep(seconds)
        tell_peers(2)
    else:
        told = wait_until_told(patience)
    return time.monotonic() - began, told


def test_the_others_stay_until_the_rank_at_fault_has_spoken_but_not_for_ever() -> None:
    waited, told = run_once_on_ranks(2, waited_for_rank_0, 1.5, 60.0)[1].result
    assert 1.0 < waited < 30 and told == 2, "with which status it leaves"
    waited, told = run_once_on_ranks(2, waited_for_rank_0, 3.0, 0.5)[1].result
    assert waited < 2.5 and told is None
    tell_peers()  # one process alone has nobody to wait for
    wait_until_told(60.0)
