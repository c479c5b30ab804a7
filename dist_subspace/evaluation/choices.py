"""Multiple choice by likelihood: each choice stands in the place of a record's answer, in the training's own template, and its
tokens are those that training would have trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_subspace.errors import UsageError
from dist_subspace.evaluation.samples import table_of
from dist_subspace.training.data import DataSettings, TokenTable
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.formats import FORMATS
from dist_subspace.training.data.samples import Sample
from dist_subspace.training.data.template import give_chat_template

Record = Mapping[str, Any]
_ANSWERS = {"alpaca": "output", "completion": "completion"}
WITH_ANSWERS = (*_ANSWERS, "chat")


@dataclass(frozen=True)
class AskedChoices:
    """texts: the same choices for every record; field: else a column with a list of them; answer_field: a column with the right
    one, its text or its number from 0, where it is not the record's own answer."""

    texts: tuple[str, ...] = ()
    field: str | None = None
    answer_field: str | None = None

    @property
    def any(self) -> bool:
        return bool(self.texts) or self.field is not None


@dataclass(frozen=True)
class Choices:
    """n questions. table: a sample for each choice, those of a question one behind the other; first: `(n + 1,)`, where they
    begin; right: `(n,)`, which of them is; lengths: in characters, of each choice; records: `(n,)`, counted from 1."""

    table: TokenTable
    first: np.ndarray
    right: np.ndarray
    lengths: np.ndarray
    records: np.ndarray
    left_out: int
    """Records with a choice that is longer than `data.max_length`."""

    def __len__(self) -> int:
        return len(self.right)


def read_choices(
    records: Sequence[Record], source: str, settings: DataSettings, tokenizer: Any, asked: AskedChoices
) -> Choices:
    """Local: the questions of a source's records.

    Raises:
        UsageError: a format without answers, a record without choices, or without a right one.
    """
    if settings.format not in WITH_ANSWERS:
        raise UsageError(
            f"data.format is {settings.format!r}, in which there is no answer to choose; accepted with --choice and "
            f"--choices-field: {', '.join(WITH_ANSWERS)}"
        )
    if settings.format == "chat":
        give_chat_template(tokenizer)
    encoder = Encoder(tokenizer)
    samples: list[Sample] = []
    of_record: list[int] = []
    right, first, lengths, kept, left_out = [], [0], [], [], 0
    for number, record in enumerate(records, 1):
        row = Row(dict(record), number, source, settings)
        texts = _texts(row, asked)
        found = [_sample(row, text, encoder) for text in texts]
        whole = [sample for sample in found if sample is not None]
        if len(whole) < len(found):
            left_out += 1
            continue
        right.append(_right(row, texts, asked))
        samples += whole
        of_record += [number] * len(whole)
        lengths += [len(text) for text in texts]
        first.append(len(samples))
        kept.append(number)
    if not samples:
        raise UsageError(f"{source}: no record is left whose choices fit into data.max_length {settings.max_length}")
    of_first, of_right, of_length, of_kept = (np.asarray(values, np.int64) for values in (first, right, lengths, kept))
    return Choices(table_of(samples, of_record), of_first, of_right, of_length, of_kept, left_out)


def choice_results(choices: Choices, number: int, losses: Sequence[float]) -> dict[str, Any]:
    """What figures.py reads of one question, from the losses of its choices."""
    places = slice(int(choices.first[number]), int(choices.first[number + 1]))
    return {
        "right": int(choices.right[number]),
        "log_likelihoods": [-loss for loss in losses],
        "lengths": choices.lengths[places].tolist(),
    }


def _texts(row: Row, asked: AskedChoices) -> list[str]:
    if asked.field is None:
        return list(asked.texts)
    given = row.record.get(asked.field)
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(text, str) and text for text in given):
        raise UsageError(
            f"{row} has no list of two or more texts in column {asked.field!r}, which --choices-field names"
        )
    return given


def _right(row: Row, texts: Sequence[str], asked: AskedChoices) -> int:
    if asked.answer_field is not None:
        answer = row.record.get(asked.answer_field)
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
            return answer
        what = f"column {asked.answer_field!r}"
    else:
        answer, what = _own_answer(row), "answer"
    folded = [text.strip() for text in texts]
    if isinstance(answer, str) and folded.count(answer.strip()) == 1:
        return folded.index(answer.strip())
    raise UsageError(
        f"{row} has {answer!r:.80} as its {what}, which is none of its choices ({', '.join(map(repr, folded[:4]))}"
        f"{', ...' if len(folded) > 4 else ''}); accepted: the text of one of them, or --answer-field COLUMN with text or number"
    )


def _own_answer(row: Row) -> Any:
    column = _ANSWERS.get(row.settings.format)
    if column is not None:
        return row.text(column)
    messages = row.value("messages")
    last = messages[-1] if isinstance(messages, list) and messages else {}
    return last.get("content") if isinstance(last, dict) else None


def _sample(row: Row, text: str, encoder: Encoder) -> Sample | None:
    """The record with this answer, of which the last trained tokens alone count; None where it does not fit."""
    settings = row.settings
    column = _ANSWERS.get(settings.format)
    if column is not None:
        record = row.record | {settings.column(column): text}
    else:
        record = row.record | {settings.column("messages"): _with_last(row.value("messages"), text)}
    (outcomes,) = FORMATS[settings.format]([Row(record, row.number, row.source, settings)], encoder)
    sample = outcomes[-1].sample
    return None if sample is None else Sample(sample.ids, last_run(np.asarray(sample.trained, bool)))


def _with_last(messages: Any, text: str) -> list[Any]:
    """The messages with this text as the last answer."""
    given = list(messages) if isinstance(messages, list) else []
    if given and isinstance(given[-1], dict) and given[-1].get("role") == "assistant":
        given = given[:-1]
    return [*given, {"role": "assistant", "content": text}]


def last_run(trained: np.ndarray) -> np.ndarray:
    """The mask with its last run of targets alone."""
    places = np.flatnonzero(trained)
    kept = np.zeros_like(trained)
    if len(places):
        breaks = np.flatnonzero(np.diff(places) > 1)
        kept[places[breaks[-1] + 1] if len(breaks) else places[0] : places[-1] + 1] = True
    return kept
