"""YAML and overrides are read as people write them, and what is dumped reads back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_subspace.config import config_schema, dump_config, fill_unset, load_config, settings_of_all
from dist_subspace.config.schema import Config, TrainingSection
from dist_subspace.errors import UsageError
from dist_subspace.storage import storages
from tests.ranks import ROOT

OLD_RUNS = sorted((ROOT / "tests" / "fixtures").glob("*_tree/run-*/config.yaml"))
TEXT = """
model: {path: a-model}
data: {train: a.jsonl}
training:
  learning_rate: 2e-4
  num_train_epochs: 3
subspace:
"""
BASE: dict[str, Any] = {"model": {"path": "a-model"}, "data": {"train": "a.jsonl"}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "my-recipe.yaml"
    path.write_text(TEXT)
    return path


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_the_run_its_folder(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.run.output_dir == "runs/my-recipe"
    assert load_config(str(recipe), ["run.output_dir=elsewhere"]).run.output_dir == "elsewhere"
    assert config.training.learning_rate == 2e-4  # YAML 1.1 takes 2e-4 for text


def test_overrides_are_yaml_and_the_last_one_wins(recipe: Path) -> None:
    overrides = ["subspace.method=ssl", "training.max_steps=50", "training.max_steps=60", "subspace.options.scale=1e-3"]
    config = load_config(recipe, overrides)
    assert (config.subspace.method, config.training.max_steps) == ("ssl", 60)
    assert config.subspace.options == {"scale": 0.001}


def test_an_override_of_steps_takes_the_files_epochs_away(recipe: Path) -> None:
    assert load_config(recipe).training.num_train_epochs == 3
    assert load_config(recipe, ["training.max_steps=5"]).training.num_train_epochs is None


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ("max_steps", "num_train_epochs"),
        ("num_train_epochs", "max_steps"),
        ("warmup_steps", "warmup_ratio"),
        ("warmup_ratio", "warmup_steps"),
    ],
)
def test_an_override_of_one_of_a_pair_takes_the_other_of_the_file_away_and_null_takes_nothing(
    given: str, other: str
) -> None:
    file = BASE | {"training": {other: 0.25 if "warmup" in other else 7}}
    value = 0.5 if "warmup" in given else 3
    found = load_config(file, [f"training.{given}={value}"]).training
    assert found == load_config(BASE, [f"training.{given}={value}"]).training
    if given in ("max_steps", "num_train_epochs"):
        assert load_config(file, [f"training.{given}=null"]).training == load_config(file).training


def test_a_folder_that_is_null_is_the_files(recipe: Path) -> None:
    assert load_config(recipe, ["run.output_dir=null"]).run.output_dir == "runs/my-recipe"


def test_ranks_must_share_every_key_but_those_that_say_where_something_lies() -> None:
    places = {"model.path", "model.tokenizer", "subspace.init_from", "data.train", "data.eval", "data.cache_dir"}
    places |= {"deepspeed.config", "deepspeed.nvme_path", "checkpoint.resume", "run.output_dir"}
    every = {f"{name}.{key}" for name, field in Config.model_fields.items() for key in field.annotation.model_fields}  # type: ignore[union-attr]
    assert every > places
    shared = settings_of_all(load_config(BASE, ["training.seed=3", "data.max_length=9"]))
    assert set(shared) == every - places
    assert (shared["training.seed"], shared["data.max_length"]) == (3, 9)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3", -3),
        ("+3", 3),
        ("-2e-4", -2e-4),
        ("-.5", -0.5),
        ("-.inf", float("-inf")),
        ("10:30:00", "10:30:00"),
        ("2e-4", 2e-4),
        ("1_000", 1000),
        ("0x1f", 31),
        ("017", "017"),
        ("2024-01-31", "2024-01-31"),
    ],
)
def test_a_value_that_yaml_1_1_misreads_is_what_a_person_meant(text: str, value: Any) -> None:
    assert load_config(BASE, [f"subspace.options.given={text}"]).subspace.options["given"] == value


def test_a_mapping_is_not_changed() -> None:
    given = {"model": {"path": "m"}, "data": {"train": "a"}}
    load_config(given, ["model.path=other"])
    assert given == {"model": {"path": "m"}, "data": {"train": "a"}}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "training.num_train_epochs=1.5",
            "training.warmup_ratio=0.1",
            "training.max_time=01:00:00",
            "run.report_to=none",
        ),
        ("data.train=[{path: a, weight: 0.5}]", "data.eval=0.1", "checkpoint.resume=no", "model.dtype=bf16"),
        ("run.output_dir='1e5'", "data.template='a: {input}\n'", "model.path='no'", "data.split='10:30:00'"),
        ("subspace.target_modules='.*proj'", "subspace.options={a: [1, 2.5e-7, x]}", "deepspeed.config={a: {b: auto}}"),
    ],
)
def test_what_is_dumped_reads_back_equal(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = load_config(BASE, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("override", ["training.max_steps", "=3", ".max_steps=3", "training.=3", ""])
def test_an_override_that_is_no_key_and_value_is_refused(override: str) -> None:
    with pytest.raises(UsageError, match=r"override .* accepted: section\.key=value"):
        load_config(BASE, [override])


def test_an_override_cannot_go_into_a_value() -> None:
    with pytest.raises(UsageError, match=r"goes into model\.path, which is 'a-model'"):
        load_config(BASE, ["model.path.x=1"])


def test_an_override_that_is_not_yaml_is_named() -> None:
    with pytest.raises(UsageError, match=r"override 'model\.path=\[' is not readable YAML"):
        load_config(BASE, ["model.path=["])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.yaml' cannot be read \(No such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)


def test_yaml_that_cannot_be_read_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not readable YAML at line 3: ") as caught:
        load_config(written(tmp_path, "model:\n  path: m\n path: n\n"))
    assert "\n" not in str(caught.value)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 3: 'path' is given twice"):
        load_config(written(tmp_path, "model:\n  path: m\n  path: n\n"))


@pytest.mark.parametrize(("text", "state"), [("", "empty"), ("- a\n", "no mapping"), ("text", "no mapping")])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str, state: str) -> None:
    with pytest.raises(UsageError, match=f"is {state}; accepted: sections model, subspace, data"):
        load_config(written(tmp_path, text))


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not readable YAML at line 1: could not determine a constructor"):
        load_config(written(tmp_path, "model: !!python/object/apply:os.getcwd []\n"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        load_config(path)


def test_only_keys_left_open_are_filled() -> None:
    values = {"training.lr_scheduler_type": "linear", "training.optim": "sgd"}
    given = load_config(BASE, ["training.optim=adagrad"])
    filled = fill_unset(given, values)
    assert (filled.training.lr_scheduler_type, filled.training.optim) == ("linear", "adagrad")
    assert filled.training.model_fields_set == given.training.model_fields_set | {"lr_scheduler_type"}
    assert filled.subspace.model_fields_set == given.subspace.model_fields_set, "an adapter's own values stay open"


@pytest.mark.parametrize("saved", OLD_RUNS, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_the_configuration_of_an_old_run_has_a_key_less_and_is_read(saved: Path) -> None:
    """Earlier versions wrote `data.streaming: false` into config.yaml, which a run that resumes reads."""
    assert "streaming: false" in saved.read_text()
    config = load_config(saved)
    assert "streaming" not in dump_config(config) and load_config(saved, ["data.streaming=false"]) == config


@pytest.mark.parametrize("value", ["true", "null", "1", "sometimes"])
def test_streaming_is_refused_with_what_to_do(value: str) -> None:
    with pytest.raises(UsageError, match=r"^data\.streaming is .*; accepted: leave the key out$"):
        load_config(BASE, [f"data.streaming={value}"])
    assert "streaming" not in config_schema()["$defs"]["DataSection"]["properties"]


def test_the_schema_knows_every_key_with_its_description() -> None:
    schema = config_schema()
    assert list(schema["properties"]) == ["model", "subspace", "data", "training", "deepspeed", "checkpoint", "run"]
    training = schema["$defs"]["TrainingSection"]
    assert training["additionalProperties"] is False
    assert set(training["properties"]) == {*TrainingSection.model_fields, "warmup_ratio"}
    for properties in (schema["properties"], *(section["properties"] for section in schema["$defs"].values())):
        assert all("description" in entry for entry in properties.values())
    assert schema["$defs"]["ModelSection"]["properties"]["storage"]["enum"] == sorted(storages())
