"""The kinds of options: what each lets through, and in which words it says so."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.options import Option, choice, flag, is_number, name_list, number, steps, text, whole

# option -> what it accepts, what it refuses, its words
OPTIONS: dict[str, tuple[Option, list[Any], list[Any], str]] = {
    "choice": (choice("a", "", "b", 2), ["a", "b", 2], ["c", 2.0, True, None], "a, b, 2"),
    "choice of true": (choice(1, "", True), [1, True], [1.0, False], "1, True"),
    "flag": (flag(False, ""), [True, False], [0, 1, "true", None], "False, True"),
    "any number": (number(1.0, ""), [-3, 0.5], [math.nan, math.inf, True, "1", None], "a number"),
    "at least": (number(1.0, "", least=0), [0, 2.5], [-1e-9], "a number at least 0"),
    "above": (number(1.0, "", above=0, most=1), [1e-9, 1], [0, 1.1], "a number above 0 and at most 1"),
    "number or null": (number(None, "", least=1), [None, 1], [0], "a number at least 1 or null"),
    "whole": (whole(4, ""), [1, 9], [0, 1.0, True, None], "a whole number of at least 1"),
    "whole or null": (whole(None, "", least=2), [None, 2], [1], "a whole number of at least 2 or null"),
    "steps": (steps(None, ""), [None, 0, 5], [-1, 1.0], "a whole number of at least 0 or null"),
    "names": (name_list(""), [(), ["a"], ("a", "b")], ["a", [1], None], "a list of name endings"),
    "text": (text(""), [None, "", "a"], [1, ["a"]], "a text or null"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_lets_through_what_its_words_say(kind: str) -> None:
    option, good, bad, words = OPTIONS[kind]
    assert option.accepted == words
    assert [value for value in good if not option.accepts(value)] == []
    assert [value for value in bad if option.accepts(value)] == []
    option.check("width", option.default)


def test_a_refusal_names_the_option_its_value_and_what_is_accepted() -> None:
    with pytest.raises(UsageError, match=r"^subspace\.options\.width is 0; accepted: a whole number of at least 1$"):
        whole(4, "").check("width", 0)
    with pytest.raises(UsageError, match=r"^model\.storage_options\.width is 0;"):
        whole(4, "").check("width", 0, "model.storage_options")


def test_a_truth_value_is_no_number() -> None:
    assert is_number(1) and is_number(0.5) and not is_number(True) and not is_number("1")
