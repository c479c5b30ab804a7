"""Written answers against wanted ones: values of SQuAD's own script, and answers of GSM8K."""

from __future__ import annotations

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.metrics.answers import answer_pattern, exact_match, extracted, token_f1

GSM8K = answer_pattern(r"#### (-?[0-9.,]+)")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", "7"),
        ("first #### 1, and then\n#### 1,234", "1,234"),  # the last one
        ("no answer", None),
    ],
)
def test_an_answer_is_the_last_place_that_the_expression_finds(text: str, found: str | None) -> None:
    assert extracted(text, GSM8K) == found


def test_without_a_group_or_an_expression_the_whole_counts() -> None:
    assert extracted("it is answer3.", answer_pattern(r"answer\d")) == "answer3"
    assert extracted("  as it stands\n", None) == "as it stands"
    with pytest.raises(UsageError, match=r"--answer-regex is '\('.* no regular expression"):
        answer_pattern("(")


@pytest.mark.parametrize(
    ("answer", "wanted", "same"),
    [
        ("1,234", "1234", True),
        ("7.0", "7", True),
        ("7.", "7", True),
        ("-3", "3", False),
        ("3.5", "35", False),
        ("a  b\nc", "a b c", True),
        ("A b", "a b", False),
        (None, "7", False),
        (None, None, False),
        ("nan", "nan", True),
        ("nan", "NaN", False),
    ],
)
def test_numbers_are_compared_as_numbers_and_texts_as_texts(answer: str | None, wanted: str, same: bool) -> None:
    assert exact_match(answer, wanted) is same


@pytest.mark.parametrize(
    ("answer", "wanted", "f1"),
    [
        ("the cat sat", "a cat sat down", 2 * 1.0 * (2 / 3) / (1.0 + 2 / 3)),  # {cat, sat} of {cat, sat, down}
        ("The Cat!", "cat", 1.0),
        ("the", "a", 1.0),  # nothing is left of either
        ("the", "cat", 0.0),
        ("cat cat", "cat", 2 * 0.5 * 1.0 / 1.5),
        (None, "cat", 0.0),
    ],
)
def test_token_f1_is_that_of_squad(answer: str | None, wanted: str, f1: float) -> None:
    assert token_f1(answer, wanted) == pytest.approx(f1)
