"""A configuration that is wrong is answered by one sentence: the field, its value, and what would be accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from dist_subspace.config.fields import Section
from dist_subspace.config.messages import describe, dotted_keys, first_problem
from dist_subspace.errors import UsageError


class Source(Section):
    path: str
    weight: float = Field(1.0, gt=0, le=2)


class Data(Section):
    train: str | list[str | Source] = "a"
    kind: Literal["chat", "text"] = "text"
    extra: dict[str, int] = Field(default_factory=dict)


class Training(Section):
    max_steps: Annotated[int, Field(ge=1)] | None = None
    learning_rate: float = 1e-3


class Top(Section):
    data: Data = Data()
    training: Training = Training()


def sentence(**given: Any) -> str:
    with pytest.raises(ValidationError) as raised:
        Top.model_validate(given)
    problem = first_problem(raised.value, Top)
    assert isinstance(problem, UsageError)
    return str(problem)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"training": {"max_steps": 0}}, "training.max_steps is 0; accepted: a whole number of at least 1, or null"),
        ({"training": {"learning_rate": "1"}}, "training.learning_rate is '1'; accepted: a number"),
        ({"training": 3}, "training is 3; accepted: a mapping of keys to values"),
        ({"data": {"extra": {"a": "b"}}}, "data.extra.a is 'b'; accepted: a whole number"),
        ({"data": {1: 2}}, "data has the key 1; accepted: keys that are text"),
    ],
    ids=str,
)
def test_the_sentence_names_field_value_and_what_is_accepted(given: dict[str, Any], expected: str) -> None:
    assert sentence(**given) == expected


def test_a_key_that_is_none_is_told_the_nearest_one() -> None:
    assert sentence(training={"learning_rat": 1.0}) == (
        "training.learning_rat is no key of the configuration; the nearest is training.learning_rate"
    )
    assert sentence(max_steps=3).endswith("max_steps is no key of the configuration; the nearest is training.max_steps")
    assert sentence(data={"learning_rate": 1.0}).endswith("the nearest is training.learning_rate")


def test_of_a_field_that_may_be_several_things_the_nearest_is_spoken_of() -> None:
    found = sentence(data={"train": [{"path": "b", "weight": 3.0}]})
    assert found == "data.train[0].weight is 3.0; accepted: a number above 0 and at most 2"
    assert sentence(data={"train": [{"weight": 1.0}]}) == "data.train[0].path is missing; accepted: text"


def test_a_word_that_is_none_of_a_list_is_told_the_list() -> None:
    found = sentence(data={"kind": "chatt"})
    assert found.startswith("data.kind is 'chatt'") and "chat" in found and "text" in found


def test_the_first_wrong_field_is_the_one_that_is_spoken_of() -> None:
    assert sentence(training={"max_steps": 0, "learning_rate": "x"}).startswith("training.max_steps is 0")


def test_every_key_is_listed_with_its_section() -> None:
    assert list(dotted_keys(Training, "training.")) == ["training.max_steps", "training.learning_rate"]
    assert set(dotted_keys(Top)) >= {"data", "data.train", "training.max_steps"}


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | str | None, "a whole number, text, or null"),
        (int | None, "a whole number, or null"),
        (list[int], "a list of a whole number"),
        (tuple[str, ...], "a list of text"),
        (dict[str, Any], "a mapping"),
        (dict[str, float], "a mapping from names to a number"),
        (Literal["a", 2], "a, 2"),
        (Source, "{path, weight}"),
        (Annotated[float, Field(ge=0, lt=1)], "a number of at least 0 and below 1"),
        (bool, "true or false"),
    ],
    ids=str,
)
def test_a_type_is_described_in_words(annotation: Any, words: str) -> None:
    assert describe(annotation) == words
