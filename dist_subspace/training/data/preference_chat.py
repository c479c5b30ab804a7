"""Preferences in conversations, through the tokenizer's own chat template.

An answer is what the rendering with it has beyond the prompt's, token for token. A prompt that is too long loses whole oldest
turns (`data.truncation`), then its left part.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from dist_subspace.errors import UsageError
from dist_subspace.training.data.chat import SYSTEM, give_chat_template, unread_remarks
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.messages import Conversation, Message, conversation_of, messages_in
from dist_subspace.training.data.preference import desirable, sample_of
from dist_subspace.training.data.samples import Outcome
from dist_subspace.training.data.turns import NEVER_ENDS

OTHERWISE = (
    "{count} prompts are rendered otherwise by the chat template once they are answered: the answer begins where the renderings "
    "part"
)


@dataclass(frozen=True)
class _Asked:
    """A prompt, and the messages of each answer to it."""

    talk: Conversation
    answers: list[list[Message]]

    def texts(self, encoder: Encoder) -> list[str]:
        """The renderings of the prompt, and of the prompt with each answer."""
        template, row = encoder.chat_template, self.talk.row
        answered = [replace(self.talk, messages=[*self.talk.messages, *answer]) for answer in self.answers]
        if not self.talk.messages:
            raise UsageError(f"{row} has an empty prompt; accepted: at least one message before the answers")
        return [template.text(self.talk, prompt=True), *map(template.text, answered)]


def chat_preference(rows: list[Row], encoder: Encoder) -> list[list[Outcome]]:
    """prompt, chosen, rejected, each a list of messages; without a prompt it is the messages that both answers begin with."""
    return _samples([_pair(row) for row in rows], [None] * len(rows), encoder)


def chat_unpaired_preference(rows: list[Row], encoder: Encoder) -> list[list[Outcome]]:
    """prompt, completion, label, the first two lists of messages."""
    asked = [
        _Asked(conversation_of(row, messages_in(row, "prompt", "user")), [_answer(row, _said(row, "completion"))])
        for row in rows
    ]
    return _samples(asked, [desirable(row) for row in rows], encoder)


def _samples(asked: list[_Asked], labels: Sequence[str | None], encoder: Encoder) -> list[list[Outcome]]:
    give_chat_template(encoder.tokenizer)
    texts = [one.texts(encoder) for one in asked]
    ids = iter(encoder.ids([text for several in texts for text in several]))
    unread = unread_remarks(encoder.chat_template)
    outcomes = []
    for one, label, several in zip(asked, labels, texts, strict=True):
        encoded = [next(ids) for _ in several]
        outcomes.append([_sample(one, label, several, encoded, encoder, unread(one.talk))])
    return outcomes


def _sample(
    one: _Asked, label: str | None, texts: list[str], ids: list[list[int]], encoder: Encoder, remarks: set[str]
) -> Outcome:
    settings, whole = one.talk.row.settings, max(map(len, ids))
    prompt, answers, said = _parted(texts, ids, encoder)
    if len(prompt) + max(map(len, answers)) > settings.max_length and settings.truncation == "turns":
        prompt, answers = _with_fewer_turns(one, prompt, answers, settings.max_length, encoder)
    outcome = sample_of(one.talk.row, prompt, answers, label, encoder, tuple(sorted(remarks | said)))
    return replace(outcome, length=max(whole, outcome.length)) if outcome.length else outcome


def _parted(texts: list[str], ids: list[list[int]], encoder: Encoder) -> tuple[list[int], list[list[int]], set[str]]:
    """(ids of the prompt, of each answer with its end, what there is to say)."""
    prompt, *answered = ids
    shared = len(os.path.commonprefix([prompt, *answered]))
    said = {OTHERWISE} if shared < len(prompt) else set()
    answers = []
    for text, whole in zip(texts[1:], answered, strict=True):
        closed = encoder.chat_template.ends.search(text) is not None
        if not closed and not encoder.end:
            said.add(NEVER_ENDS)
        answers.append(whole[shared:] if closed else whole[shared:] + encoder.end)
    return prompt[:shared], answers, said


def _with_fewer_turns(
    one: _Asked, prompt: list[int], answers: list[list[int]], limit: int, encoder: Encoder
) -> tuple[list[int], list[list[int]]]:
    """Prompt and answers without as few of the prompt's oldest turns as make them fit; where none do, with its last turn."""
    roles = [message["role"] for message in one.talk.messages]
    first = len(list(takewhile(lambda role: role in SYSTEM, roles)))
    for start in (place for place in range(first + 1, len(roles)) if roles[place] == "user"):
        shorter = replace(one, talk=one.talk.without(first, start))
        if encoder.chat_template.maybe(shorter.talk, prompt=True) is None:
            continue
        texts = shorter.texts(encoder)
        prompt, answers, _ = _parted(texts, encoder.ids(texts), encoder)
        if len(prompt) + max(map(len, answers)) <= limit:
            break
    return prompt, answers


def _pair(row: Row) -> _Asked:
    chosen, rejected = _said(row, "chosen"), _said(row, "rejected")
    given = row.record.get(row.settings.column("prompt")) is not None
    prompt = messages_in(row, "prompt", "user") if given else []
    if not given or (chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"):
        shared = _shared(chosen, rejected)
        if given and shared[len(shared) - len(prompt) :] != prompt:
            raise UsageError(
                f"{row} has a prompt that is not what its answers begin with; accepted: answers that begin with the assistant, "
                "or whole conversations without a column for the prompt"
            )
        if not shared:
            raise UsageError(
                f"{row} has no column {row.settings.column('prompt')!r}, and its answers do not begin with the same message; "
                "accepted: a prompt, or chosen and rejected that both begin with it"
            )
        prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
    return _Asked(conversation_of(row, prompt), [_answer(row, chosen), _answer(row, rejected)])


def _shared(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages that both begin with, less what would leave nothing to be answered."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _said(row: Row, name: str) -> list[Message]:
    return messages_in(row, name, "assistant")


def _answer(row: Row, messages: list[Message]) -> list[Message]:
    if messages[0]["role"] != "assistant":
        raise UsageError(
            f"{row} has an answer that begins with a message of {messages[0]['role']!r}; accepted: assistant"
        )
    return messages
