"""What is said to the user: who hears it, and how layers are named in a sentence."""

from __future__ import annotations

import pytest

from dist_subspace.errors import Notice
from dist_subspace.notices import heard, named, say


def test_the_innermost_listener_hears_and_the_outer_one_again_behind_it() -> None:
    outer: list[str] = []
    inner: list[str] = []
    with heard(outer.append):
        say("one")
        with heard(inner.append):
            say("two")
        say("three")
    assert outer == ["one", "three"] and inner == ["two"]


def test_a_listener_that_fails_is_not_asked_again() -> None:
    outer: list[str] = []
    with heard(outer.append):
        with pytest.raises(ValueError, match="boom"), heard(lambda sentence: None):
            raise ValueError("boom")
        say("after it")
    assert outer == ["after it"]


def test_without_a_listener_it_is_a_warning_of_our_own_at_the_callers_line() -> None:
    def speak() -> None:
        say("mind this")

    with pytest.warns(Notice, match="^mind this$") as warned:
        speak()
    assert warned[0].filename == __file__


def test_layers_of_one_kind_are_named_once_and_too_many_kinds_are_counted() -> None:
    blocks = [f"model.layers.{n}.{name}" for n in range(3) for name in ("q_proj", "k_proj")]
    assert named(blocks) == "model.layers.0.q_proj and 2 like it, model.layers.0.k_proj and 2 like it"
    assert named(["head"]) == "head"
    assert named(list("abcdef")) == "a, b, c, d and 2 other kinds"
    assert named(list("abcd")) == "a, b, c, d"
    assert named(list("abc"), shown=1) == "a and 2 other kinds"
