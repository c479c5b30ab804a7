"""Every key has a type, a range, a default and a description; a bad value is one sentence with field, value and accepted."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from dist_subspace.config import load_config
from dist_subspace.config.names import Reporter
from dist_subspace.config.schema import Config
from dist_subspace.errors import UsageError

BASE: dict[str, Any] = {"model": {"path": "a-model"}, "data": {"train": "a.jsonl"}}


def refusal(*overrides: str, base: dict[str, Any] = BASE) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(base, overrides)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [f.annotation for f in model.model_fields.values()]
    below = [m for m in inner if isinstance(m, type) and issubclass(m, BaseModel)]
    return [model, *(found for m in below for found in sections(m))]


def test_only_a_model_and_data_are_required() -> None:
    config = load_config(BASE)
    assert (config.model.storage, config.deepspeed.preset, config.subspace.method) == ("nf4", "zero3", "lora")
    assert (config.training.max_steps, config.training.global_batch_size) == (1000, 64)
    assert (config.training.learning_rate, config.training.warmup_steps) == ("auto", 0.03)
    assert config.training.gradient_checkpointing_kwargs.use_reentrant is False
    assert dict(config.training.gradient_checkpointing_kwargs) == {"use_reentrant": False}


@pytest.mark.parametrize("section", sections(Config), ids=lambda m: m.__name__)
def test_every_key_is_described_in_one_line(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        assert field.description and "\n" not in field.description and field.description.endswith("."), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "subspace.rank_pattern={q_proj: 0}",
            "subspace.rank_pattern.q_proj is 0; accepted: a whole number of at least 1",
        ),
        ("subspace.alpha_pattern={q_proj: -1}", "subspace.alpha_pattern.q_proj is -1; accepted: a number above 0"),
    ],
)
def test_a_pattern_names_the_layer_whose_value_is_wrong(override: str, message: str) -> None:
    assert message in refusal(override)


def test_a_configuration_is_frozen() -> None:
    config = load_config(BASE)
    with pytest.raises(ValidationError):
        config.training.max_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=0", "training.max_steps is 0; accepted: a whole number of at least 1, or null"),
        ("training.max_steps=1.5", "training.max_steps is 1.5; accepted: a whole number of at least 1, or null"),
        ("training.max_steps=many", "training.max_steps is 'many'; accepted: a whole number of at least 1, or null"),
        ("training.max_steps=true", "training.max_steps is True; accepted: a whole number of at least 1, or null"),
        ("training.learning_rate=-1e-4", "training.learning_rate is -0.0001; accepted: a number above 0, or auto"),
        ("training.learning_rate=.nan", "training.learning_rate is nan; accepted: a number above 0, or auto"),
        ("training.learning_rate=.inf", "training.learning_rate is inf; accepted: a number above 0, or auto"),
        ("training.weight_decay=.inf", "training.weight_decay is inf; accepted: a number of at least 0"),
        ("training.adam_beta2=1", "training.adam_beta2 is 1; accepted: a number of at least 0 and below 1"),
        ("training.gradient_checkpointing=1", "training.gradient_checkpointing is 1; accepted: true or false"),
        ("subspace.rank=0", "subspace.rank is 0; accepted: a whole number of at least 1, or null"),
        ("subspace.dropout=1.0", "subspace.dropout is 1.0; accepted: a number of at least 0 and below 1"),
        ("subspace.dropout=-0.1", "subspace.dropout is -0.1; accepted: a number of at least 0 and below 1"),
        ("subspace.options=3", "subspace.options is 3; accepted: a mapping"),
        ("subspace.target_modules=[1]", "subspace.target_modules[0] is 1; accepted: text, a list of text, or null"),
        ("data.eval=1.5", "data.eval is 1.5; accepted: text, a number above 0 and below 1, or null"),
        ("data.max_length=1", "data.max_length is 1; accepted: a whole number of at least 2"),
        ("data.train=[{path: a, weight: .inf}]", "data.train[0].weight is inf; accepted: a number above 0"),
        ("run.report_to=[none, tensorboard]", "run.report_to is ['none', 'tensorboard']; 'none' stands alone"),
        ("data.train=[]", "data.train is []; accepted: text, or a list of {path, weight}"),
        ("data.train=[{path: a, weight: 0}]", "data.train[0].weight is 0; accepted: a number above 0"),
        ("training=5", "training is 5; accepted: a mapping of keys to values"),
        ("model.path=", "model.path is None; accepted: text"),
    ],
)
def test_a_wrong_type_or_range_names_field_value_and_accepted(override: str, message: str) -> None:
    assert refusal(override) == message


@pytest.mark.parametrize(
    ("override", "value", "some_accepted"),
    [
        ("model.task=chat", "chat", ["causal-lm", "classification"]),
        ("model.dtype=float64", "float64", ["float32", "bfloat16", "float16"]),
        ("data.truncation=left", "left", ["turns", "tokens"]),
        ("data.format=aplaca", "aplaca", ["alpaca", "chat", "completion", "text", "classification"]),
        ("deepspeed.preset=zero4", "zero4", ["zero0", "zero3-nvme"]),
        ("subspace.constraint=mpc", "mpc", ["none", "mpc_o", "mpc_d", "mpc_n"]),
        ("training.optim=adam", "adam", ["adamw_torch", "paged_adamw_8bit"]),
        ("training.lr_scheduler_type=cosin", "cosin", ["cosine", "linear"]),
        ("training.on_nonfinite=die", "die", ["skip", "stop"]),
        ("run.report_to=tensorbord", "tensorbord", [*get_args(Reporter), "none"]),
        ("run.report_to=wand", "wand", [*get_args(Reporter), "none"]),
        ("run.report_to=[wandb, comet]", "comet", [*get_args(Reporter), "none"]),
        ("checkpoint.allow_different=[seed]", "seed", ["model", "method", "data"]),
    ],
)
def test_an_unknown_name_lists_the_accepted_ones(override: str, value: str, some_accepted: list[str]) -> None:
    message = refusal(override)
    assert message.startswith(override.partition("=")[0]) and repr(value) in message
    listed = message.rpartition("accepted: ")[2].split(", ")
    assert set(some_accepted) <= set(listed)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.learning_rat", "training.learning_rate"),
        ("subspace.ranks", "subspace.rank"),
        ("model.learning_rate", "training.learning_rate"),
        ("rank", "subspace.rank"),
        ("trainin", "training"),
        ("training.gradient_checkpointing_kwargs.reentrant", "training.gradient_checkpointing_kwargs.use_reentrant"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str) -> None:
    assert refusal(f"{key}=1") == f"{key} is no key of the configuration; the nearest is {nearest}"


def test_an_unknown_key_of_a_data_source_names_its_place() -> None:
    message = refusal("data.train=[{path: a}, {path: b, wieght: 2}]")
    assert message == "data.train[1].wieght is no key of the configuration; the nearest is data.train[1].weight"


@pytest.mark.parametrize(("base", "missing"), [({}, "model.path"), ({"model": {"path": "m"}}, "data.train")])
def test_a_missing_key_is_named(base: dict[str, Any], missing: str) -> None:
    assert refusal(base=base).startswith(f"{missing} is missing")


def test_the_global_batch_is_a_multiple_of_the_batch_per_device() -> None:
    message = refusal("training.global_batch_size=6", "training.per_device_train_batch_size=4")
    assert "training.global_batch_size is 6" in message and "per_device_train_batch_size, which is 4" in message
    load_config(BASE, ["training.global_batch_size=12", "training.per_device_train_batch_size=4"])


def test_epochs_replace_steps_and_both_are_refused() -> None:
    epochs = load_config(BASE, ["training.num_train_epochs=2"]).training
    assert (epochs.max_steps, epochs.num_train_epochs) == (None, 2)
    assert load_config(BASE | {"training": {"max_steps": None}}).training.max_steps == 1000
    message = refusal(base=BASE | {"training": {"max_steps": 5, "num_train_epochs": 2}})
    assert "training.max_steps is 5" in message and "training.num_train_epochs is 2" in message


def test_warmup_ratio_becomes_warmup_steps_and_both_are_refused() -> None:
    assert load_config(BASE, ["training.warmup_ratio=0.1"]).training.warmup_steps == 0.1
    assert "warmup_ratio is 0.1" in refusal(base=BASE | {"training": {"warmup_ratio": 0.1, "warmup_steps": 5}})
    for ratio in ("3", "1", "1.0", "-0.1", "true"):  # a warmup_steps of 1 would be one step
        assert "training.warmup_ratio is" in refusal(f"training.warmup_ratio={ratio}")
    assert "training.warmup_steps is 2.5" in refusal("training.warmup_steps=2.5")
    assert load_config(BASE, ["training.warmup_steps=100"]).training.warmup_steps == 100


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("01:30:00", 5400), ("10:30:00", 37800), ("100:00:01", 360001)]
)
def test_max_time_is_seconds_or_a_clock(text: str, seconds: float) -> None:
    assert load_config(BASE, [f"training.max_time={text}"]).training.max_time == seconds


@pytest.mark.parametrize("text", ["5m", "10:30", "0", "-1"])
def test_another_max_time_is_refused(text: str) -> None:
    assert refusal(f"training.max_time={text}").startswith("training.max_time is ")


def test_rank_timeout_is_five_minutes_or_seconds_or_a_clock_or_none_and_leaves_time_to_leave() -> None:
    assert load_config(BASE).training.rank_timeout == 300.0
    for text, value in (("00:10:00", 600.0), ("10", 10.0), ("null", None)):
        assert load_config(BASE, [f"training.rank_timeout={text}"]).training.rank_timeout == value
    assert refusal("training.rank_timeout=9").startswith("training.rank_timeout is 9")
    assert "at least 10" in refusal("training.rank_timeout=9")


@pytest.mark.parametrize(
    ("text", "trackers"),
    [("none", ()), ("", ()), ("[]", ()), ("wandb", ("wandb",)), ("[wandb, mlflow]", ("wandb", "mlflow"))],
)
def test_report_to_is_a_list_a_name_or_none(text: str, trackers: tuple[str, ...]) -> None:
    assert load_config(BASE, [f"run.report_to={text}"]).run.report_to == trackers


@pytest.mark.parametrize(
    ("text", "resume"), [("auto", "auto"), ("none", "none"), ("no", "none"), ("", "none"), ("a/b", "a/b")]
)
def test_resume_is_auto_none_or_a_folder(text: str, resume: str) -> None:
    assert load_config(BASE, [f"checkpoint.resume={text}"]).checkpoint.resume == resume


def test_target_modules_keep_a_pattern_apart_from_a_list() -> None:
    assert load_config(BASE, ["subspace.target_modules=all-linear"]).subspace.target_modules == "all-linear"
    assert load_config(BASE, ["subspace.target_modules=[q, v]"]).subspace.target_modules == ("q", "v")
    assert load_config(BASE, ["subspace.modules_to_save=lm_head"]).subspace.modules_to_save == ("lm_head",)


def test_several_training_files_have_weights() -> None:
    train = load_config(BASE, ["data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl}]"]).data.train
    assert not isinstance(train, str)
    assert [(source.path, source.weight) for source in train] == [("a.jsonl", 2), ("b.jsonl", 1)]


def test_nvme_needs_a_folder() -> None:
    assert refusal("deepspeed.preset=zero3-nvme").startswith("deepspeed.nvme_path is null")
    load_config(BASE, ["deepspeed.preset=zero3-nvme", "deepspeed.nvme_path=fast"])
    load_config(BASE, ["deepspeed.preset=zero3-nvme", "deepspeed.config=own.json"])  # which says where itself


def test_double_quant_is_said_once() -> None:
    message = refusal("model.double_quant=true", "model.storage_options.double_quant=false")
    assert message.startswith("model.double_quant is True and model.storage_options.double_quant is False; accepted")
    load_config(BASE, ["model.storage_options.double_quant=false"])


def test_short_names_of_types_are_understood() -> None:
    assert load_config(BASE, ["model.dtype=bf16"]).model.dtype == "bfloat16"
