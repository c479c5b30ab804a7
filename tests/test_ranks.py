"""The harness itself: a failing rank is seen at once, with everything that is known about every rank."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import CASE_TIMEOUT, RanksFailed, run_on_ranks, run_once_on_ranks


def who_am_i(tag: str) -> tuple[str, int, int, int]:
    return tag, dist.get_rank(), dist.get_world_size(), os.getpid()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total


def raise_on_each() -> None:
    print(f"about to fail on {dist.get_rank()}")
    raise ValueError(f"broken on rank {dist.get_rank()}")


def raise_on_last_others_wait() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("only the last is broken")
    time.sleep(1000)


def die_on_first_others_wait(how: str) -> None:
    if dist.get_rank() == 0:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    dist.barrier()


def hang_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(1000)


def leave_with_two() -> None:
    if dist.get_rank() == 1:
        sys.exit(2)
    dist.destroy_process_group()


def leave_state_behind() -> None:
    import deepspeed

    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    engine_losses(3)
    torch.set_default_dtype(torch.float64)  # after the engine: where a CPU has float16, DeepSpeed makes none of float64
    context = deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 1})
    context.__enter__()


def state_seen() -> dict[str, object]:
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    return {
        "environment": "LEFT_BEHIND" in os.environ,
        "dtype": torch.get_default_dtype(),
        "folder": os.getcwd() == "/",
        "stack": len(parameter_offload.FWD_MODULE_STACK),
        "contexts": partition_parameters.zero_init_context,
        "partitioned": hasattr(torch.nn.Linear(2, 2).weight, "ds_id"),
        "linear": torch.nn.functional.linear.__module__,
    }


def engine_losses(stage: int) -> list[float]:
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 1))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 1000,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    losses = []
    for _ in range(3):
        loss = engine(torch.ones(2, 8, dtype=next(model.parameters()).dtype)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_runs_the_function_in_one_group(world_size: int) -> None:
    seen = run_on_ranks(world_size, who_am_i, "x")
    assert [(tag, rank, size) for tag, rank, size, _ in seen] == [("x", rank, world_size) for rank in range(world_size)]
    totals = run_on_ranks(world_size, sum_over_ranks, torch.ones(2))
    assert all(total.tolist() == [world_size * (world_size + 1) / 2] * 2 for total in totals)


def test_cases_share_the_processes() -> None:
    first = [pid for *_, pid in run_on_ranks(2, who_am_i, "a")]
    second = [pid for *_, pid in run_on_ranks(2, who_am_i, "b")]
    assert first == second
    assert len(set(first)) == 2


def test_an_error_shows_every_ranks_traceback_and_output_and_the_next_case_runs() -> None:
    before = [pid for *_, pid in run_on_ranks(2, who_am_i, "a")]
    with pytest.raises(RanksFailed) as failure:
        run_on_ranks(2, raise_on_each)
    for rank in (0, 1):
        assert f"ValueError: broken on rank {rank}" in str(failure.value)
        assert f"about to fail on {rank}" in str(failure.value)
    after = [pid for *_, pid in run_on_ranks(2, who_am_i, "b")]
    assert not set(before) & set(after)


def test_a_rank_that_raises_does_not_leave_the_others_waiting() -> None:
    run_on_ranks(2, who_am_i, "start")
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="only the last is broken") as failure:
        run_on_ranks(2, raise_on_last_others_wait)
    assert time.monotonic() - start < CASE_TIMEOUT / 3, "the others were waited for"
    assert "in raise_on_last_others_wait" in failure.value.reports[0].output, "the stack of the rank that waits"


@pytest.mark.parametrize(("how", "status"), [("exit", 7), ("kill", -9)])
def test_a_rank_that_dies_does_not_leave_the_others_waiting(how: str, status: int) -> None:
    run_on_ranks(2, who_am_i, "start")
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=f"rank 0 left with exit status {status}"):
        run_on_ranks(2, die_on_first_others_wait, how)
    assert time.monotonic() - start < CASE_TIMEOUT / 3, "the others were waited for"


def test_a_rank_that_hangs_is_reported_at_the_timeout_with_its_stack() -> None:
    run_on_ranks(2, who_am_i, "start")
    with pytest.raises(RanksFailed) as failure:
        run_on_ranks(2, hang_on_last, timeout=2)
    good, hung = failure.value.reports
    assert good.good
    assert not hung.answered
    assert "in hang_on_last" in hung.output


def test_a_case_of_its_own_reports_how_each_rank_ended() -> None:
    first, second = run_once_on_ranks(2, leave_with_two)
    assert second.exit_status == 2
    assert "without its process group" in (first.traceback or "")


def test_a_function_inside_a_function_is_refused() -> None:
    with pytest.raises(ValueError, match="module level"):
        run_on_ranks(1, lambda: None)


def test_a_case_finds_no_state_of_the_case_before_it() -> None:
    fresh = run_on_ranks(2, state_seen)
    run_on_ranks(2, leave_state_behind)
    assert run_on_ranks(2, state_seen) == fresh


def test_many_engines_run_in_one_process() -> None:
    losses = [run_on_ranks(2, engine_losses, stage)[0] for stage in (0, 3, 1, 3, 2, 3)]
    for each in losses:
        assert each == pytest.approx(losses[0], rel=1e-5)
