"""What a configuration comes to before a weight is loaded, and what is refused there."""

from __future__ import annotations

from typing import Any

import pytest

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.training.plan import Plan, make_plan, steps_text
from tests.keys.bench import UNSET, Bench
from tests.tiny_run import POSITIONS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("plans"))


def plan_of(bench: Bench, changes: dict[str, Any]) -> Plan:
    return make_plan(load_config(bench.configuration(changes)), lambda sentence: None)


def test_the_size_of_a_run_is_said_as_it_is(bench: Bench) -> None:
    plan = plan_of(bench, {"training.global_batch_size": 6, "training.max_steps": 1234})
    assert steps_text(plan) == "1,234 steps of 6 samples (3 micro-batches in 3 rounds on 1 ranks)"
    packed = plan_of(bench, {"data.packing": True, "training.global_batch_size": 2})
    assert steps_text(packed) == "6 steps of 2 rows (1 micro-batches in 1 rounds on 1 ranks)"


@pytest.mark.parametrize(
    ("length", "packing", "widths"),
    [
        (64, False, {64}),  # the longest sample has less than 64 tokens
        (24, False, {8, 16, 24}),  # a multiple of what 64 and the greatest length have in common
        (64, True, {64}),
        (50, True, {50}),
    ],
)
def test_rows_are_padded_to_few_widths_and_packed_ones_to_one(
    length: int, packing: bool, widths: set[int], bench: Bench
) -> None:
    changes = {"data.max_length": length, "data.packing": packing, "training.global_batch_size": 2}
    changes |= {"training.per_device_train_batch_size": 1}
    batches = plan_of(bench, changes).batches
    rounds = [micro for step in range(4) for micro in batches.batch(step).rounds]
    found = {micro.inputs["input_ids"].shape[1] for micro in rounds if micro is not None}
    assert found and found <= widths


def test_a_row_that_the_model_has_no_positions_for_is_refused(bench: Bench) -> None:
    plan_of(bench, {"data.max_length": POSITIONS})
    with pytest.raises(UsageError, match=rf"data\.max_length is {POSITIONS + 1}; accepted: at most {POSITIONS}, "):
        plan_of(bench, {"data.max_length": POSITIONS + 1})


def test_rows_that_nobody_gave_a_length_are_as_long_as_the_model_has_positions_for_and_that_is_said(
    bench: Bench,
) -> None:
    said: list[str] = []
    plan = make_plan(load_config(bench.configuration({"data.max_length": UNSET})), said.append)
    assert plan.config.data.max_length == POSITIONS
    assert f"data.max_length is not given: it is {POSITIONS}, the model's positions" in said
    virtual = {"data.max_length": UNSET, "subspace.method": "prompt", "subspace.init_from": UNSET}
    fewer = plan_of(bench, virtual | {"subspace.options": {"num_virtual_tokens": 8}})
    assert fewer.config.data.max_length == POSITIONS - 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.format": "classification"}, "classification goes with classification only"),
        ({"model.task": "classification"}, "classification goes with classification only"),
        ({"training.optim": "paged_lion_8bit"}, "training.optim is 'paged_lion_8bit'"),
        ({"training.lr_scheduler_kwargs": {"cycles": 3}}, r"training.lr_scheduler_kwargs is {'cycles': 3}"),
        ({"training.early_stopping_patience": 2}, "training.early_stopping_patience is 2, but data.eval is null"),
        (
            {"checkpoint.metric_for_best_model": "loss"},
            "checkpoint.metric_for_best_model is 'loss', but data.eval is null",
        ),
        (
            {"run.sample_prompts": ["a"]},
            "run.sample_prompts has 1, which are answered at each evaluation, but data.eval is null",
        ),
        ({"subspace.method": "lara", "subspace.init_from": UNSET}, "lara"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_weight_is_loaded(
    changes: dict[str, Any], words: str, bench: Bench
) -> None:
    with pytest.raises(UsageError) as refused:
        plan_of(bench, changes)
    assert words in str(refused.value) and "\n" not in str(refused.value)
