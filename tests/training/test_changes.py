"""What a resumed run says about a checkpoint that was made otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.config import load_config
from dist_subspace.run_folder.trainer_state import TrainerState
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


# What each key of the section changes in a run that goes on: part of the sentence; None where it changes nothing that is
# computed, or is refused elsewhere (the seed).
LENGTH, FOLLOWED = "are those of the new length", "the steps that come follow the new value"
EFFECTS: dict[str, tuple[Any, str | None]] = {
    "max_steps": (9, LENGTH),
    "num_train_epochs": (2.5, LENGTH),
    "global_batch_size": (32, "the data goes on at sample (or packed row) 128"),
    "per_device_train_batch_size": (2, None),
    "per_device_eval_batch_size": (2, None),
    "optim": ("sgd", "its moments begin at zero"),
    "adam_beta1": (0.8, FOLLOWED),
    "adam_beta2": (0.9, FOLLOWED),
    "adam_epsilon": (1e-6, FOLLOWED),
    "learning_rate": (0.3, FOLLOWED),
    "lr_scheduler_type": ("linear", "follow the new schedule from their number on"),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, FOLLOWED),
    "warmup_steps": (3.0, FOLLOWED),
    "weight_decay": (0.1, FOLLOWED),
    "max_grad_norm": (0.5, FOLLOWED),
    "seed": (7, None),
    "objective": ("dpo", FOLLOWED),
    "preference": ({"beta": 0.5}, FOLLOWED),
    "gradient_checkpointing": (False, None),
    "gradient_checkpointing_kwargs": ({"use_reentrant": True}, None),
    "activation_offload": (True, None),
    "on_nonfinite": ("stop", None),
    "early_stopping_patience": (3, None),
    "max_time": (60.0, None),
    "rank_timeout": (60.0, None),
    "full_determinism": (True, None),
}


def test_every_key_of_training_has_its_case() -> None:
    assert EFFECTS.keys() == configuration().training.model_dump().keys()


@pytest.mark.parametrize("key", EFFECTS)
def test_a_key_that_changes_what_comes_is_spoken_of_with_both_values(key: str) -> None:
    now = configuration()
    if key == "num_train_epochs":
        now = load_config({"model": {"path": "m"}, "data": {"train": "t"}, "training": {"num_train_epochs": 1.5}})
    before, effect = EFFECTS[key]
    value = now.training.model_dump(mode="json")[key]
    kept = now.training.model_dump(mode="json") | {key: before}
    said = changed_settings(now, Path("checkpoint-2"), state(**kept))
    assert len(said) == (0 if effect is None else 1)
    if effect is not None:
        assert said[0].startswith(f"training.{key} is {value}, and was {before} when checkpoint-2 was made: ")
        assert effect in said[0]
