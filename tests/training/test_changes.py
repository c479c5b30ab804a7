"""What a resumed run says about a checkpoint that was made otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.checkpoint.state import TrainerState
from dist_subspace.config import load_config
from dist_subspace.training.changes import changed_settings, earlier_tokens
from dist_subspace.training.data.cutting import Cutting

CUTTING = Cutting(samples=10, cut=0, left_out=0, without_target=0, tokens_dropped=0, length_95=20)


def configuration(**data: Any) -> Any:
    return load_config(
        {
            "model": {"path": "m"},
            "data": {"train": "t.jsonl", **data},
            "training": {"max_steps": 4, "learning_rate": 0.1},
        }
    )


def state(**training: Any) -> TrainerState:
    return TrainerState(2, 20, 200, 1.0, 2, {}, {}, training=training)


@pytest.mark.parametrize(
    ("format_", "cut", "training", "told"),
    [("chat", 0, {}, True), ("alpaca", 3, {}, True), ("alpaca", 0, {}, False), ("chat", 3, {"max_steps": 4}, False)],
)
def test_tokens_that_an_earlier_version_made_otherwise_are_spoken_of(
    format_: str, cut: int, training: dict[str, Any], told: bool
) -> None:
    config = configuration(format=format_)
    sentence = earlier_tokens(config, replace(CUTTING, cut=cut), Path("run/checkpoint-2"), state(**training))
    assert (sentence is not None) == told
    assert sentence is None or sentence.startswith("checkpoint-2 is of an earlier version")


def test_each_changed_setting_is_one_sentence_and_an_equal_one_none() -> None:
    config = configuration()
    kept = config.training.model_dump(mode="json")
    assert changed_settings(config, Path("checkpoint-2"), state(**kept)) == []
    before = kept | {"learning_rate": 0.2, "lr_scheduler_type": "linear", "seed": 7}
    first, second = changed_settings(config, Path("checkpoint-2"), state(**before))
    assert first.startswith("training.learning_rate is 0.1, and was 0.2 when checkpoint-2 was made: ")
    assert second.startswith("training.lr_scheduler_type is cosine, and was linear when checkpoint-2 was made: ")


def test_another_batch_size_says_where_the_data_goes_on_and_what_is_unset_now_says_nothing() -> None:
    config = load_config(
        {
            "model": {"path": "m"},
            "data": {"train": "t.jsonl"},
            "training": {"max_steps": 4, "learning_rate": 0.1, "global_batch_size": 1000},
        }
    )
    before = config.training.model_dump(mode="json") | {"global_batch_size": 64, "num_train_epochs": 2.0}
    (said,) = changed_settings(config, Path("checkpoint-2"), state(**before))
    assert said == (
        "training.global_batch_size is 1000, and was 64 when checkpoint-2 was made: the data goes on at sample (or packed row) "
        "2,000, which is the step times the new size"
    )
