"""Conversations: the tokenizer's own chat template, and every assistant turn a target.

What the assistant says is found in the rendered text (turns.py) and carried over to tokens (masked.py). A conversation
that is too long loses whole oldest turns, then the left part of the first question that remains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.cutting import fit, leading
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.messages import Conversation, conversation
from dist_subspace.training.data.samples import NOTHING, Outcome, Sample
from dist_subspace.training.data.template import DEFAULT_CHAT_TEMPLATE, ChatTemplate, give_chat_template
from dist_subspace.training.data.turns import Passage

__all__ = ["DEFAULT_CHAT_TEMPLATE", "chat", "give_chat_template"]
SYSTEM = ("system", "developer")
SYSTEM_BESIDE = (
    "{count} records have a system prompt in the column 'system', which is no part of what is trained: put it into the "
    "messages, as one of the role 'system'"
)
Tokens = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Draft:
    """A passage of a conversation and its tokens: a sample that may still be too long."""

    talk: Conversation
    passage: Passage
    ids: np.ndarray
    trained: np.ndarray

    @property
    def length(self) -> int:
        """Tokens up to the last target: what follows teaches nothing."""
        places = np.flatnonzero(self.trained)
        return int(places[-1]) + 1 if len(places) else 0


def chat(rows: list[Row], encoder: Encoder) -> list[list[Outcome]]:
    """messages: a list of {role, content}, or ShareGPT's; a conversation without a trained turn is left out."""
    give_chat_template(encoder.tokenizer)
    talks = [conversation(row) for row in rows]
    passage_lists = [encoder.recipes.passages(talk) for talk in talks]
    drafts = iter(
        _drafts([(talk, passage) for talk, passages in zip(talks, passage_lists) for passage in passages], encoder)
    )
    of_unread = unread_remarks(encoder.chat_template)
    results = []
    for talk, passages in zip(talks, passage_lists):
        outcomes = [_fitted(next(drafts), encoder) for _ in passages] or [NOTHING]
        remarks = {remark for passage in passages for remark in passage.remarks} | of_unread(talk)
        if remarks:
            outcomes[0] = replace(outcomes[0], remarks=tuple(sorted(remarks)))
        results.append(outcomes)
    return results


def unread_remarks(template: ChatTemplate) -> Callable[[Conversation], set[str]]:
    def remarks_of(talk: Conversation) -> set[str]:
        variables = {"tools": talk.tools, "documents": talk.documents} | talk.options
        names = [name for name, value in variables.items() if value is not None and not template.reads(name, talk)]
        remarks = {f"{{count}} conversations have {name}, which the chat template does not read" for name in names}
        system_column = talk.row.record.get("system")
        has_system_turn = any(message["role"] in SYSTEM for message in talk.messages)
        if isinstance(system_column, str) and system_column.strip() and not has_system_turn:
            remarks.add(SYSTEM_BESIDE)
        return remarks

    return remarks_of


def _drafts(parts: list[tuple[Conversation, Passage]], encoder: Encoder) -> list[_Draft]:
    fillings = [passage.filling for _, passage in parts]
    filled = iter(encoder.patterns.tokens([filling for filling in fillings if filling is not None]))
    by_pattern = [next(filled) if filling is not None else None for filling in fillings]
    others = [passage for (_, passage), tokens in zip(parts, by_pattern) if tokens is None]
    by_text = iter(encoder.masked.tokens([(passage.text, passage.spans, passage.contents) for passage in others]))
    drafts = []
    for (talk, passage), tokens in zip(parts, by_pattern):
        ids, trained = _with_end(passage, tokens if tokens is not None else next(by_text), encoder)
        drafts.append(_Draft(talk, passage, ids, trained))
    return drafts


def _with_end(passage: Passage, tokens: Tokens, encoder: Encoder) -> Tokens:
    if not passage.ended:
        return tokens
    return np.append(tokens[0], np.int32(encoder.end[0])), np.append(tokens[1], True)


def _fitted(draft: _Draft, encoder: Encoder) -> Outcome:
    settings = draft.talk.row.settings
    limit = settings.max_length
    if len(draft.ids) <= limit and draft.trained[1:].any():
        return Outcome(Sample(draft.ids, draft.trained), len(draft.ids))
    whole_length, kept_heads = draft.length, []
    if whole_length > limit and settings.truncation == "turns":
        draft = _with_fewer_turns(draft, encoder, limit)
        kept_heads = [_head_length(draft, encoder)] if draft.length > limit else []
    kept_heads.append(leading(draft.ids, encoder.special))  # all that stays where the system turn is too long as well
    outcome = fit(draft.ids, draft.trained, limit, kept_heads)
    return replace(outcome, length=max(whole_length, len(outcome.sample.ids) if outcome.sample else 0))


def _with_fewer_turns(draft: _Draft, encoder: Encoder, limit: int) -> _Draft:
    """The draft without as few of its oldest turns as make it fit; where none do, with its last turn only."""
    talk = draft.talk.upto(draft.passage.through)
    if len(draft.passage.spans) == 1:
        talk = _only_last_trained(talk)
    roles = [message["role"] for message in talk.messages]
    first_turn = next((place for place, role in enumerate(roles) if role not in SYSTEM), len(roles))
    last_trained = max(place for place, is_trained in enumerate(talk.trained) if is_trained)
    starts = [place for place in range(first_turn + 1, last_trained) if roles[place] == "user"]
    shortest, low, high = draft, 0, len(starts)
    while low < high:  # the fewer turns, the shorter: the first of `starts` from which on it fits
        middle = (low + high) // 2
        shortened = _rendered_alone(talk.without(first_turn, starts[middle]), encoder)
        if shortened is not None and shortened.length <= limit:
            shortest, high = shortened, middle
        else:
            low = middle + 1
    if shortest is draft and starts:
        return _rendered_alone(talk.without(first_turn, starts[-1]), encoder) or draft
    return shortest


def _only_last_trained(talk: Conversation) -> Conversation:
    last = max(place for place, is_trained in enumerate(talk.trained) if is_trained)
    return replace(talk, trained=[place == last for place in range(len(talk.trained))])


def _rendered_alone(talk: Conversation, encoder: Encoder) -> _Draft | None:
    """The shorter conversation as one draft; None where its template refuses it or parts it."""
    if encoder.chat_template.maybe(talk) is None:
        return None
    passages = encoder.recipes.passages(talk)
    return _drafts([(talk, passages[0])], encoder)[0] if len(passages) == 1 else None


def _head_length(draft: _Draft, encoder: Encoder) -> int:
    """Tokens up to where the first question's own text begins: the marks, the system turn, the tools."""
    special_count, passage_text = leading(draft.ids, encoder.special), draft.passage.text
    talk = draft.talk.upto(draft.passage.through)
    last_trained = max(place for place, is_trained in enumerate(talk.trained) if is_trained)
    # A passage is a rendering, or begins with a prompt.
    for part, prompt in ((talk, False), (talk.upto(last_trained), True)):
        text = encoder.chat_template.maybe(part, prompt)
        start = _question_start(part, text, prompt, encoder.chat_template) if text is not None else None
        if text is not None and start is not None and passage_text.startswith(text[: start + 1]):
            _, is_behind = encoder.masked.tokens([(passage_text, [(start, len(passage_text))], [])])[0]
            return max(special_count, int(np.argmax(is_behind))) if is_behind.any() else special_count
    return special_count


def _question_start(talk: Conversation, text: str, prompt: bool, template: ChatTemplate) -> int | None:
    """Where in `text`, a rendering, the first content begins that is not the system's."""
    places = zip(template.places(talk, text, prompt), talk.messages)
    asked = (place for place, message in places if message["role"] not in SYSTEM)
    return next((place[0] for place in asked if place is not None), None)
