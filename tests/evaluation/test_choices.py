"""Which samples a question becomes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.evaluation.choices import AskedChoices, last_run, read_choices
from dist_subspace.training.data import DataSettings
from tests.training.data.tokens_for_tests import char_tokenizer

YES_NO = AskedChoices(("yes", "no"))


def settings(**given: Any) -> DataSettings:
    return DataSettings(**{"train": "", "format": "completion", "max_length": 20, **given})


def texts(choices: Any) -> list[str]:
    tokenizer = char_tokenizer()
    samples = [choices.table.sample(number) for number in range(len(choices.table))]
    return [tokenizer.decode([i for i in labels if i >= 0]) for _, labels in samples]


def test_each_choice_is_a_sample_whose_targets_are_the_choice() -> None:
    rows = [{"prompt": "a?", "completion": "yes"}, {"prompt": "b?", "completion": " no"}]
    found = read_choices(rows, "x", settings(), char_tokenizer(), YES_NO)
    assert texts(found) == ["yes</s>", "no</s>"] * 2
    assert (found.right.tolist(), found.first.tolist(), found.lengths.tolist()) == ([0, 1], [0, 2, 4], [3, 2, 3, 2])


def test_a_record_may_have_choices_of_its_own_and_name_the_right_one() -> None:
    rows = [
        {"prompt": "a?", "completion": "", "of": ["x", "y", "z"], "gold": 2},
        {"prompt": "b?", "completion": "", "of": ["u", "v"], "gold": "u"},
    ]
    found = read_choices(rows, "x", settings(), char_tokenizer(), AskedChoices((), "of", "gold"))
    assert (texts(found), found.right.tolist()) == (["x</s>", "y</s>", "z</s>", "u</s>", "v</s>"], [2, 0])


def test_in_a_conversation_the_last_answer_alone_counts() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"messages": [*talk, {"role": "assistant", "content": "yes"}]}
    found = read_choices([row], "x", settings(format="chat", max_length=200), char_tokenizer(), YES_NO)
    assert [text.strip() for text in texts(found)] == ["yes</s>", "no</s>"] and found.right.tolist() == [0]


def test_a_record_whose_choice_does_not_fit_is_left_out_and_counted() -> None:
    rows = [
        {"prompt": "a", "completion": "no", "of": ["no", "y" * 30]},
        {"prompt": "b", "completion": "no", "of": ["no", "x"]},
    ]
    found = read_choices(rows, "x", settings(), char_tokenizer(), AskedChoices((), "of"))
    assert (found.left_out, found.records.tolist()) == (1, [2])


@pytest.mark.parametrize(
    ("row", "asked", "given", "sentence"),
    [
        (
            {"prompt": "a", "completion": "maybe"},
            YES_NO,
            {},
            "record 1 has 'maybe' as its answer, which is none of its choices",
        ),
        (
            {"prompt": "a", "completion": "no", "gold": 7},
            AskedChoices(("yes", "no"), None, "gold"),
            {},
            "has 7 as its column 'gold'",
        ),
        (
            {"prompt": "a", "completion": "no"},
            AskedChoices((), "of"),
            {},
            "no list of two or more texts in column 'of'",
        ),
        ({"text": "a"}, YES_NO, {"format": "text"}, "in which there is no answer to choose"),
    ],
)
def test_a_question_without_a_right_choice_is_refused(
    row: dict[str, Any], asked: AskedChoices, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        read_choices([row], "x", settings(**given), char_tokenizer(), asked)


def test_the_last_run_of_targets() -> None:
    mask = np.array([1, 1, 0, 1, 0, 1, 1], bool)
    assert last_run(mask).tolist() == [False] * 5 + [True] * 2
    assert not last_run(np.zeros(3, bool)).any()
