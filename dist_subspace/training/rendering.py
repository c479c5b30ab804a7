"""A sample as text, as the model sees it, with what is trained told apart: in colour, or between marks. Local."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from dist_subspace.training.data import IGNORED, TokenTable
from dist_subspace.training.data.preference import DESIRABLE
from dist_subspace.training.data.preference_batch import split_pair
from dist_subspace.training.data.settings import PAIRED, UNPAIRED

MARKS = ("[[", "]]")  # around what is trained, where there is no colour
STYLE = "bold green"

Ids = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of which all are targets, or none is."""

    text: str
    trained: bool


def spans_of(tokenizer: Any, ids: Ids, labels: Ids) -> list[Span]:
    """The spans of a sample, whose texts one after the other are the text of its ids, special tokens among them.

    Arguments:
        labels: as long as `ids`; -100 where a token is no target.
    """
    trained = np.asarray(labels) != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    before, spans = "", []
    for start, end in pairwise(edges):
        so_far = _decoded(tokenizer, ids[:end])
        # A character may be parted by an edge: then its span is decoded alone.
        text = so_far[len(before) :] if so_far.startswith(before) else _decoded(tokenizer, ids[start:end])
        before = so_far
        spans.append(Span(text, bool(trained[start])))
    return spans


def sample_text(tokenizer: Any, table: TokenTable, number: int, labels: Sequence[str] | None, colour: bool) -> Text:
    """One sample of a table. Of a classified text nothing is marked, and its class stands behind it."""
    ids, targets = table.sample(number)
    if table.classification:
        name = labels[int(targets[0])] if labels is not None else str(int(targets[0]))
        return Text(f"{_decoded(tokenizer, ids)}\n").append(f"class: {name}", STYLE if colour else "")
    return _marked(spans_of(tokenizer, ids, targets), colour)


def _marked(spans: Sequence[Span], colour: bool) -> Text:
    text = Text()
    for span in spans:
        marked = span.text if colour or not span.trained else f"{MARKS[0]}{span.text}{MARKS[1]}"
        text.append(marked, STYLE if span.trained and colour else "")
    return text


def texts_of(
    tokenizer: Any, table: TokenTable, number: int, labels: Sequence[str] | None, colour: bool, form: str
) -> list[tuple[str, Text]]:
    """(title, text) of each text of a sample; of a pair these are two. form: as `data.format`."""
    if form in PAIRED:
        prompt, *answers = split_pair(table, number)
        titles = ("chosen: ", "rejected: ")
        return [
            (title, _answered(tokenizer, prompt, answer, colour)) for title, answer in zip(titles, answers, strict=True)
        ]
    title = ("desirable: " if table.label(number) == DESIRABLE else "undesirable: ") if form in UNPAIRED else ""
    return [(title, sample_text(tokenizer, table, number, labels, colour))]


def _answered(tokenizer: Any, prompt: list[int], answer: list[int], colour: bool) -> Text:
    return _marked(spans_of(tokenizer, [*prompt, *answer], [*[IGNORED] * len(prompt), *answer]), colour)


def has_colour(console: Console) -> bool:
    """Whether colours are seen where it prints."""
    return bool(console.is_terminal and console.color_system and not console.no_color)


def show_samples(
    console: Console,
    tokenizer: Any,
    table: TokenTable,
    numbers: Sequence[int],
    labels: Sequence[str] | None,
    form: str = "",
) -> None:
    """Print these samples, each under its number, its length and how many of its tokens are trained. form: as `data.format`."""
    colour = has_colour(console)
    if not table.classification:
        how = "in green" if colour else f"between {MARKS[0]} and {MARKS[1]}"
        console.print(f"what is trained stands {how}", soft_wrap=True, markup=False)
    for number in numbers:
        count = f"{table.lengths[number]:,} tokens"
        trained = "" if table.classification else f", {table.target_counts[number]:,} trained"
        console.print(Text(f"-- sample {number} ({count}{trained})", "dim" if colour else ""), soft_wrap=True)
        for title, text in texts_of(tokenizer, table, number, labels, colour, form):
            console.print(Text(title).append(text), soft_wrap=True)


def _decoded(tokenizer: Any, ids: Ids) -> str:
    """With special tokens, and every blank where it was."""
    return str(tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False))
