"""What a run does that sets nothing: the defaults, which are Hugging Face's where it has the key."""

from __future__ import annotations

from functools import partial

import pytest
from transformers import get_scheduler

from tests.keys.bench import Bench
from tests.keys.reference import adamw, assert_values, train_plainly
from tests.keys.training_optimizer import OWN_RATE


def test_a_section_that_sets_nothing_trains_as_the_documented_defaults_say(bench: Bench) -> None:
    config = bench.configuration({})
    config["training"] = {"max_steps": 6, "global_batch_size": 4}
    config["run"] = {"output_dir": config["run"]["output_dir"], "report_to": "none"}
    del config["deepspeed"], config["checkpoint"]
    outcome = bench.go(config)
    expected = train_plainly(
        bench.peft_model(),
        outcome.trained_on,
        optimizer=partial(adamw, lr=OWN_RATE),
        scheduler=partial(get_scheduler, "cosine", num_warmup_steps=1, num_training_steps=6),  # 3 % of six, rounded up
        max_grad_norm=1.0,
    )
    assert_values(outcome.adapter, expected.values)
    assert [line["step"] for line in outcome.steps] == [1, 6]
    assert [line["learning_rate"] for line in outcome.steps] == pytest.approx([expected.rates[0], expected.rates[5]])
    assert outcome.steps[1]["loss"] == pytest.approx(sum(expected.losses[1:]) / 5, rel=2e-5)
    assert outcome.seen.engines[-1].zero_optimization_stage() == 3
    micro_batches = [len(call.rows) for call in outcome.calls if call.trains]
    assert micro_batches == [1] * 24
    assert outcome.seen.layers == [True] * (2 * 2 * 24), "every layer is computed twice, both times with a graph"
