"""The same references on two ranks under ZeRO-3: decay, clipping, accumulation and schedule are those of one process."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import get_scheduler

from dist_subspace.placement.collectives import gather_objects
from tests.keys.bench import Bench, Outcome, run_here
from tests.keys.reference import assert_follows, decaying, differ, train_plainly
from tests.ranks import run_on_ranks

STEPS, MICRO_BATCHES = 4, 3  # of two samples each: in the second round of a step rank 1 has none
CHANGES = {
    "deepspeed.preset": "zero3",
    "training.max_steps": STEPS,
    "training.global_batch_size": 6,
    "training.weight_decay": 0.5,
    "training.max_grad_norm": 0.1,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 0.4,  # of 4 steps: 1.6, rounded up
}


def calls_of(configs: list[dict[str, Any]]) -> list[list[list[list[list[int]]]]]:
    """For each run the rows of every training call, by rank."""
    found = []
    for config in configs:
        outcome = run_here(config)
        found.append(gather_objects([call.rows for call in outcome.calls if call.trains]))
    return found


def in_order(calls: list[list[list[list[int]]]]) -> list[list[int]]:
    """The rows as one process has them: the micro-batches of a step are dealt to the ranks in turn."""
    assert [len(own) for own in calls] == [2 * STEPS] * 2
    dealt = [calls[number % 2][2 * step + number // 2] for step in range(STEPS) for number in range(MICRO_BATCHES)]
    return [row for rows in dealt for row in rows]


def test_two_ranks_under_zero_3_go_the_way_of_a_plain_loop(bench: Bench) -> None:
    configs = [bench.configuration(CHANGES), bench.configuration(CHANGES | {"deepspeed.preset": "zero0"})]
    ranks = run_on_ranks(2, calls_of, configs)
    assert ranks[0] == ranks[1]
    outcomes = [Outcome.of(config) for config in configs]
    for outcome, calls in zip(outcomes, ranks[0], strict=True):
        rows = in_order(calls)
        schedule = partial(get_scheduler, "cosine", num_warmup_steps=2, num_training_steps=STEPS)
        expected = train_plainly(
            bench.peft_model(), rows, batch=6, optimizer=decaying, scheduler=schedule, max_grad_norm=0.1
        )
        assert min(expected.norms) > 0.1 and len(set(expected.rates)) == 3
        assert_follows(outcome, expected)
    assert differ(outcomes[0], bench.usual())
