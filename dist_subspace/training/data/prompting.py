"""What a model is given to be answered: the prompts of records, as they stand in training, and where an answer ends.

alpaca          the filled template, up to where the answer begins
chat            the chat template's rendering of the messages before the last answer, with the generation prompt
completion      the prompt as it stands
text            the text as it stands, to be gone on with

Formats of preferences have the prompts of `completion` or `chat`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.formats import alpaca_prompt
from dist_subspace.training.data.messages import Conversation, conversation
from dist_subspace.training.data.settings import DataSettings, prompted_as
from dist_subspace.training.data.template import ChatTemplate, give_chat_template

WRITTEN = ("alpaca", "chat", "completion", "text")
"""The formats whose answers are written."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as a model is given it."""

    text: str
    ids: list[int]
    """With what the tokenizer puts before a text, and without an end."""
    answer: str | None
    """The answer that the record holds, where it holds one."""


class Prompting:
    """Prompts in one format, with one tokenizer."""

    def __init__(self, settings: DataSettings, tokenizer: Any) -> None:
        """Raises UsageError for a format that has no answers which are written."""
        check_written(settings)
        settings = replace(settings, format=prompted_as(settings.format))
        if settings.format == "chat":
            give_chat_template(tokenizer)
        self.settings, self.encoder = settings, Encoder(tokenizer)

    def of_records(self, records: Sequence[dict[str, Any]], source: str = "the input", first: int = 1) -> list[Prompt]:
        """The prompts of records with the training's columns; columns of answers may be absent.

        Arguments:
            source, first: what a message calls the records, and the number of the first.

        Raises:
            UsageError: a record without a column that a prompt needs.
        """
        rows = [Row(record, first + i, source, self.settings) for i, record in enumerate(records)]
        if self.settings.format == "chat":
            return self._of_talks([conversation(row) for row in rows])
        if self.settings.format == "alpaca":
            texts, column = [alpaca_prompt(row) for row in rows], "output"
        elif self.settings.format == "completion":
            texts, column = [row.text("prompt") for row in rows], "completion"
        else:
            texts, column = [row.text("text") for row in rows], None
        ids = self.encoder.starting(texts)
        answers = [None if column is None else (row.text(column, optional=True) or None) for row in rows]
        return [self._checked(*parts) for parts in zip(rows, texts, ids, answers, strict=True)]

    def record(
        self, text: str, *, system: str | None = None, history: Sequence[dict[str, Any]] = (), **columns: Any
    ) -> dict[str, Any]:
        """The record of one text: an instruction, a user's turn, or the text itself.

        Arguments:
            system: the system turn of a conversation; history: its turns before.
            columns: further ones (`input`, `tools`, ...), by the format's own names.

        Raises:
            UsageError: a system turn or a history in a format that has none.
        """
        if self.settings.format == "chat":
            begun = [{"role": "system", "content": system}] if system is not None else []
            return self._named({"messages": [*begun, *history, {"role": "user", "content": text}], **columns})
        for name, given in (("system", system), ("history", history), ("tools", columns.get("tools"))):
            if given:
                raise UsageError(f"{name} is given, but format {self.settings.format!r} has none; accepted: chat")
        column = {"alpaca": "instruction", "completion": "prompt", "text": "text"}[self.settings.format]
        return self._named({column: text, **columns})

    def stops(self) -> list[int]:
        """Ids at which an answer ends: the end of sequence, and what the chat template closes an answer with."""
        ids = list(self.encoder.end)
        if self.settings.format == "chat":
            ids += self._closing()
        return list(dict.fromkeys(ids))

    def _of_talks(self, talks: list[Conversation]) -> list[Prompt]:
        asked = [talk.upto(_before_answer(talk)) for talk in talks]
        texts = [self.encoder.chat_template.text(talk, prompt=True) for talk in asked]
        ids = self.encoder.ids(texts)
        answers = [_answer(talk, part) for talk, part in zip(talks, asked, strict=True)]
        return [self._checked(*parts) for parts in zip([talk.row for talk in talks], texts, ids, answers, strict=True)]

    def _checked(self, row: Row, text: str, ids: list[int], answer: str | None) -> Prompt:
        if not ids:
            raise UsageError(f"{row} has an empty prompt; accepted: at least one token")
        return Prompt(text, ids, answer)

    def _named(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record's columns by the names that they have in this data."""
        return {getattr(self.settings, f"{name}_field", None) or name: value for name, value in record.items()}

    def _closing(self) -> list[int]:
        """The special token that closes an answer, or, where the template has none, those that begin the next turn."""
        template, tokenizer = self.encoder.chat_template, self.encoder.tokenizer
        nothing = Conversation(Row({}, 1, "a plain question", self.settings), [], [])
        _, closing = template.usual(nothing)
        found = _special_at(template, closing, 0)
        if found is not None:
            return [int(tokenizer.convert_tokens_to_ids(found))]
        followed = []
        for role in ("user", "tool"):
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
            talk = replace(nothing, messages=[*messages, {"role": role, "content": "z"}], trained=[False, True, False])
            whole = template.maybe(talk)
            place = template.places(talk, whole)[1] if whole is not None else None
            token = _special_at(template, whole, place[1]) if whole is not None and place is not None else None
            followed += [int(tokenizer.convert_tokens_to_ids(token))] if token is not None else []
        return followed


def check_written(settings: DataSettings) -> None:
    """Raises UsageError for a format that has no answers which are written."""
    if prompted_as(settings.format) not in WRITTEN:
        raise UsageError(
            f"data.format is {settings.format!r}, in which no answer is written; accepted: {', '.join(WRITTEN)}"
        )


def _special_at(template: ChatTemplate, text: str, start: int) -> str | None:
    """The special token that stands there, perhaps behind blanks."""
    special = "|".join(map(re.escape, template.special_tokens)) or r"(?!)"
    found = re.compile(rf"\s*({special})").match(text, start)
    return None if found is None else found[1]


def _before_answer(talk: Conversation) -> int:
    """How many messages stand before the last answer: all, where the assistant is to speak next.

    Raises:
        UsageError: nothing stands before it.
    """
    end = len(talk.messages)
    while end and talk.messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        raise UsageError(
            f"{talk} has turns of the assistant alone; accepted: a message of another role before the answer"
        )
    return end


def _answer(talk: Conversation, asked: Conversation) -> str | None:
    after = talk.messages[len(asked.messages) :]
    return str(after[0].get("content", "")) if after else None
