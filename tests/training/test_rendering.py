"""A sample as the model sees it: all of its text, and what is trained told apart, in colour or by marks."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from dist_subspace.training.data import IGNORED
from dist_subspace.training.rendering import MARKS, sample_text, show_samples, spans_of
from tests.tiny_run import make_tokenizer


class Table:
    """One sample, as a `TokenTable` gives it."""

    def __init__(self, ids: list[int], labels: list[int], classification: bool = False) -> None:
        self.ids, self.labels, self.classification = np.asarray(ids), np.asarray(labels), classification
        self.lengths, self.target_counts = [len(ids)], [sum(label != IGNORED for label in labels)]

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids, self.labels


def ids_of(text: str) -> list[int]:
    return list(make_tokenizer()(text, add_special_tokens=False).input_ids)


def two_turns() -> Table:
    """<s>question?answer</s> again?more</s>: the answers and their ends are trained."""
    ids, labels = [0], [IGNORED]
    for text, trained in (("question? ", False), ("the answer", True), (" again?\n", False), ("more", True)):
        own = ids_of(text) + ([1] if trained else [])
        ids += own
        labels += own if trained else [IGNORED] * len(own)
    return Table(ids, labels)


def test_the_spans_are_the_text_in_order_and_those_that_are_targets_are_trained() -> None:
    table = two_turns()
    spans = spans_of(make_tokenizer(), table.ids, table.labels)
    assert [(span.text, span.trained) for span in spans] == [
        ("<s>question? ", False),
        ("the answer</s>", True),
        (" again?\n", False),
        ("more</s>", True),
    ]


def test_a_character_that_is_parted_between_two_spans_is_no_reason_to_fail() -> None:
    ids = ids_of("ä")  # two bytes
    assert len(ids) == 2
    spans = spans_of(make_tokenizer(), ids, [IGNORED, ids[1]])
    assert [span.trained for span in spans] == [False, True]


@pytest.mark.parametrize("width", [40, 200])
def test_without_colour_marks_stand_around_what_is_trained_and_nothing_is_cut(width: int) -> None:
    file = io.StringIO()
    show_samples(Console(file=file, width=width), make_tokenizer(), two_turns(), [0], None)  # type: ignore[arg-type]
    head, title, *text = file.getvalue().splitlines()
    assert head == f"what is trained stands between {MARKS[0]} and {MARKS[1]}"
    assert title == "-- sample 0 (35 tokens, 16 trained)"
    assert "\n".join(text) == "<s>question? [[the answer</s>]] again?\n[[more</s>]]"


def test_with_colour_what_is_trained_has_one_and_no_mark() -> None:
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=True, color_system="standard", no_color=False)
    show_samples(console, make_tokenizer(), two_turns(), [0], None)  # type: ignore[arg-type]
    coloured = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", file.getvalue(), re.DOTALL)
    assert coloured == ["the answer</s>", "more</s>"] and MARKS[0] not in file.getvalue()


def test_a_classified_text_has_its_class_behind_it() -> None:
    table = Table(ids_of("fine"), [1], classification=True)
    shown = sample_text(make_tokenizer(), table, 0, ["bad", "good"], colour=False)  # type: ignore[arg-type]
    assert shown.plain == "fine\nclass: good"
