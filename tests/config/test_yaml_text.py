"""YAML as people mean it: numbers of YAML 1.2, each key once, and a value that is read back as it was written."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dist_subspace.config.yaml_text import parse, text_of
from dist_subspace.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1_000", 1000),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("0x1F", 31),
        ("10:30:00", "10:30:00"),
        ("2026-01-02", "2026-01-02"),
        ("010", "010"),
        ("+7", 7),
        ("e5", "e5"),
        ("no", False),
        ("null", None),
        (".inf", math.inf),
    ],
)
def test_a_scalar_is_what_it_looks_like(text: str, value: Any) -> None:
    found = parse(f"a: {text}", "x.yaml")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        2e-4,
        1e22,
        1000,
        "2e-4",
        "1_000",
        "10:30:00",
        "2026-01-02",
        "no",
        "010",
        "",
        "é",
        [1, [2.5]],
        {"b": 1, "a": None},
    ],
    ids=repr,
)
def test_what_is_written_is_read_back_with_its_type_and_order(value: Any) -> None:
    found = parse(text_of({"key": value}), "x.yaml")["key"]
    assert found == value and type(found) is type(value)
    if isinstance(value, dict):
        assert list(found) == list(value)


def test_a_key_that_is_given_twice_is_refused_with_its_line() -> None:
    with pytest.raises(UsageError, match=r"^x\.yaml is not readable YAML at line 3: 'a' is given twice$"):
        parse("a: 1\nb: 2\na: 3\n", "x.yaml")
    with pytest.raises(UsageError, match="'c' is given twice"):
        parse("a:\n  c: 1\n  c: 2\n", "x.yaml")


def test_merge_keys_may_come_twice_and_are_merged() -> None:
    text = "one: &one {a: 1}\ntwo: &two {b: 2}\nboth:\n  <<: *one\n  <<: *two\n"
    assert parse(text, "x.yaml")["both"]["b"] == 2


@pytest.mark.parametrize("text", ["a: [1", "a: !!python/object/apply:os.getcwd []", "a: 1\n---\nb: 2"])
def test_what_is_no_plain_yaml_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"^x\.yaml is not readable YAML"):
        parse(text, "x.yaml")
