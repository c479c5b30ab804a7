"""Every key of a section that a part of the run has a setting for reaches that setting."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from dist_subspace import SubspaceConfig, load_frozen
from dist_subspace.config import load_config
from dist_subspace.config.schema import DataSection, ModelSection, SubspaceSection
from dist_subspace.errors import UsageError
from dist_subspace.subspace import resolve
from dist_subspace.training.data import BatchSettings, DataSettings
from dist_subspace.training.sections import adam_settings, batch_settings, data_settings, subspace_config

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}}
# A value for each key that is not its default.
SUBSPACE: dict[str, Any] = {
    **{"method": "dora", "rank": 3, "alpha": 5.0, "dropout": 0.1, "target_modules": ("q_proj",)},
    **{"exclude_modules": ("k_proj",), "modules_to_save": ("score",), "constraint": "mpc_o", "constraint_weight": 0.2},
    **{"options": {"lr_ratio": 2.0}, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 9.0}},
    **{"target_parameters": ("experts.down_proj",), "expert_parameters": "shared"},
}
DATA: dict[str, Any] = {
    **{"train": "b.jsonl", "eval": 0.25, "format": "chat", "max_length": 99, "template": "{a}", "truncation": "tokens"},
    **{"split": "s", "eval_split": "e"},
    **{
        f"{name}_field": f"{name}-column" for name in ("text", "prompt", "completion", "instruction", "input", "output")
    },
    **{
        f"{name}_field": f"{name}-column"
        for name in ("messages", "label", "tools", "documents", "chat_template_kwargs", "chosen", "rejected")
    },
}
# Keys of a section that another part takes, and settings that come from another section.
OF_THE_SUBSPACE = {"init_from"}
NOT_OF_THE_SUBSPACE = {"seed": "training.seed", "new_tokens": "the ids of model.new_tokens"}
OF_THE_DATA = {"packing": "batch_settings", "cache_dir": "where tokens are kept"}
OF_THE_MODEL = {"path", "tokenizer", "new_tokens"}
NOT_OF_THE_MODEL = {
    "path": "the folder that model.path comes to",
    "deepspeed": "the section deepspeed",
    "seed": "training.seed",
    "device": "the engine's",
    "progress": "the screen",
    "config_changes": "the labels of the data",
}


def test_yaml_can_say_what_python_can_say_of_a_subspace() -> None:
    python, yaml = {field.name for field in fields(SubspaceConfig)}, set(SubspaceSection.model_fields)
    assert python - NOT_OF_THE_SUBSPACE.keys() == yaml - OF_THE_SUBSPACE == SUBSPACE.keys()


def test_every_key_of_the_subspace_reaches_its_field() -> None:
    found = subspace_config(load_config(BASE | {"subspace": SUBSPACE, "training": {"seed": 7}}))
    assert {name: getattr(found, name) for name in SUBSPACE} == SUBSPACE and found.seed == 7
    default = SubspaceConfig()
    assert [name for name in SUBSPACE if getattr(default, name) == SUBSPACE[name]] == []
    assert subspace_config(load_config(BASE)).as_dict() == default.as_dict()  # fingerprints are made of it


def test_yaml_can_say_what_python_can_say_of_a_load() -> None:
    python, yaml = set(inspect.signature(load_frozen).parameters), set(ModelSection.model_fields)
    assert python - NOT_OF_THE_MODEL.keys() == yaml - OF_THE_MODEL


def test_every_key_of_the_data_reaches_its_setting() -> None:
    assert (
        {field.name for field in fields(DataSettings)} == DataSection.model_fields.keys() - OF_THE_DATA == DATA.keys()
    )
    found = data_settings(load_config(BASE | {"data": DATA}).data)
    assert {name: getattr(found, name) for name in DATA} == DATA
    default = DataSettings(train="a.jsonl")
    assert [name for name in DATA if getattr(default, name) == DATA[name]] == []
    assert data_settings(load_config(BASE).data) == default


def test_several_files_have_their_weights() -> None:
    data = {"train": [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl"}]}
    assert data_settings(load_config(BASE | {"data": data}).data).sources() == [("a.jsonl", 2.0), ("b.jsonl", 1.0)]


def test_batches_are_those_of_the_configuration() -> None:
    training = {"global_batch_size": 6, "per_device_train_batch_size": 3, "seed": 5}
    config = load_config(BASE | {"training": training}, ["data.max_length=96", "data.packing=false"])
    assert batch_settings(config) == BatchSettings(6, 3, 5, packing=False, max_length=96, pad_to_multiple=32)
    packed = load_config(config.model_dump(), ["data.packing=true", "model.attn_implementation=flash_attention_2"])
    assert batch_settings(packed) == BatchSettings(
        6, 3, 5, packing=True, max_length=96, pad_to_multiple=96, segment_lengths=True
    )


def test_what_is_classified_is_never_packed() -> None:
    config = load_config(BASE, ["data.format=classification", "model.task=classification", "data.max_length=128"])
    assert config.data.packing and not batch_settings(config).packing
    assert batch_settings(config).pad_to_multiple == 64


def test_adam_is_that_of_the_configuration() -> None:
    training = {"learning_rate": 0.1, "adam_beta1": 0.2, "adam_beta2": 0.3, "adam_epsilon": 0.4}
    found = adam_settings(load_config(BASE | {"training": training}).training)
    assert (found.learning_rate, found.beta1, found.beta2, found.epsilon) == (0.1, 0.2, 0.3, 0.4)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        *(
            ("rank", value, accepted)
            for value, accepted in ((1, True), (0, False), (-1, False), (1.5, False), (True, False))
        ),
        *(
            ("alpha", value, accepted)
            for value, accepted in ((0.5, True), (0, False), (-1, False), (NAN, False), (INF, False))
        ),
        *(
            ("dropout", value, accepted)
            for value, accepted in ((0, True), (0.99, True), (1, False), (-0.1, False), (NAN, False))
        ),
        *(("constraint_weight", value, accepted) for value, accepted in ((0, True), (-0.1, False), (INF, False))),
        *(("constraint", value, accepted) for value, accepted in (("none", True), ("mpc_d", True), ("mpc", False))),
        *(("rank_pattern", {"q_proj": value}, accepted) for value, accepted in ((2, True), (0, False), (1.5, False))),
        *(("alpha_pattern", {"q_proj": value}, accepted) for value, accepted in ((2, True), (0, False), (NAN, False))),
    ],
)
def test_yaml_and_python_have_the_same_ranges(key: str, value: Any, accepted: bool) -> None:
    """The two doors to a subspace: a file is refused before anything is read, and Python's own callers have no file."""
    for door in (
        lambda: load_config(BASE | {"subspace": {key: value}}),
        lambda: resolve(SubspaceConfig(**{key: value})),
    ):
        if accepted:
            door()
        else:
            with pytest.raises(UsageError, match=rf"^subspace\.{key}\b|^subspace\.(rank|alpha) is"):
                door()
