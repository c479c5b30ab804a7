"""A generated answer against the one that is wanted.

`exact_match` compares what is left when blanks are folded; two numbers are compared as numbers, so that 1,000 is 1000.0.
`token_f1` is SQuAD's: overlap of words, in small letters and without articles and punctuation (Rajpurkar et al. 2016).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from decimal import Decimal, InvalidOperation

from dist_subspace.errors import UsageError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_AROUND_NUMBERS = str.maketrans("", "", ",$€£%")


def answer_pattern(text: str) -> re.Pattern[str]:
    """The regular expression that finds an answer.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"--answer-regex is {text!r}, which is no regular expression: {error}") from error


def extracted(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The answer in a text: the last place that the expression finds, of which its first group, if it has one; None where it
    finds none. Without an expression the whole text."""
    if pattern is None:
        return text.strip()
    every = list(pattern.finditer(text))
    if not every:
        return None
    return (every[-1][1] or "" if pattern.groups else every[-1][0]).strip()


def exact_match(answer: str | None, wanted: str | None) -> bool:
    """Whether both are the same; an answer in which nothing was found is never right."""
    if answer is None or wanted is None:
        return False
    first, second = (" ".join(text.split()) for text in (answer, wanted))
    if first == second:
        return True
    numbers = _number(first), _number(second)
    return numbers[0] is not None and numbers[0] == numbers[1]


def token_f1(answer: str | None, wanted: str | None) -> float:
    if answer is None or wanted is None:
        return 0.0
    first, second = _words(answer), _words(wanted)
    if not first or not second:
        return float(first == second)
    shared = sum((Counter(first) & Counter(second)).values())
    return 2 * shared / (len(first) + len(second))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _number(text: str) -> Decimal | None:
    """Its value, where the text is a finite number and what people write around one."""
    try:
        value = Decimal(text.translate(_AROUND_NUMBERS).rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
