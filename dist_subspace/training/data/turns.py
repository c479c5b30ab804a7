"""What of a rendered conversation the assistant says: one text where that can be, else one for each turn.

An assistant turn is trained in the context that `generate` shows it in: the messages before it, rendered with the
generation prompt. What the conversation through that turn has beyond this context is what must be said. Where all of
this stands in the rendering of the whole conversation, that is the one text. A template that renders earlier turns
differently once later ones follow (some drop the reasoning) gives each turn a text of its own. Where a template refuses
to render a beginning of the conversation, the turn is found in the whole by its content.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from dist_subspace.errors import UsageError
from dist_subspace.training.data.messages import Conversation
from dist_subspace.training.data.patterns import Pattern
from dist_subspace.training.data.template import ChatTemplate, Span


@dataclass
class Passage:
    """A rendered text and the spans of it that are trained, in characters, ascending."""

    text: str
    spans: list[Span]
    through: int
    """How many messages of the conversation stand in it."""
    ended: bool = False
    """The end of sequence follows the text, and is trained: the template closes its turns with no token of its own."""
    remarks: tuple[str, ...] = field(default=())
    contents: list[int] = field(default_factory=list)
    """Where contents begin, as far as that is known."""
    filling: tuple[Pattern, list[str]] | None = field(default=None, compare=False)
    """The pattern that gives the text, and the contents, where they are known."""


@dataclass
class _Turn:
    index: int
    text: str
    spans: list[Span]
    in_whole: bool
    through: int


_REACH = 200  # characters in which the end of two prompts is compared
NEVER_ENDS = "{count} conversations teach no end of an answer: neither chat template nor tokenizer has a token for it"
REWORDED = "{count} conversations have an answer that the chat template shortens or rewrites: it is trained as rendered"
NO_REASONING = "{count} conversations have reasoning that the chat template leaves out of the answer: it is not trained"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names that transformers gives a template the reasoning by; the first that is there counts."""
NOT_SHOWN = "{count} conversations have a message that the chat template leaves out: it is no part of what is trained"


def passages(talk: Conversation, template: ChatTemplate) -> list[Passage]:
    """The texts of a conversation with their trained spans; none where no turn is trained.

    Raises:
        UsageError: the template refuses the messages, or what the assistant says cannot be told from the rest.
    """
    trained_turns = [i for i, trained in enumerate(talk.trained) if trained]
    if not trained_turns:
        return []
    whole = template.text(talk)
    turns = [_turn(i, talk, template, whole) for i in trained_turns]
    whole_turns = [_is_whole(talk, turn) for turn in turns]
    remarks: tuple[str, ...] = () if all(whole_turns) else (REWORDED,)
    if all(turn.in_whole for turn in turns):
        shown_passages = [Passage(whole, [span for turn in turns for span in turn.spans], len(talk.messages))]
    else:
        shown_passages = [Passage(turn.text, turn.spans, turn.through) for turn in turns]
    if not all(_shows_reasoning(talk, turn) for turn in turns):
        remarks += (NO_REASONING,)
    if not all(_shows_what_was_asked(talk, passage) for passage in shown_passages):
        remarks += (NOT_SHOWN,)
    for passage in shown_passages:
        _close(passage, template)
        passage.remarks += remarks
    return shown_passages


def _turn(i: int, talk: Conversation, template: ChatTemplate, whole: str) -> _Turn:
    is_last = i == len(talk.messages) - 1
    through = whole if is_last else template.maybe(talk.upto(i + 1))
    context = template.maybe(talk.upto(i), prompt=True)
    if through is None:
        return _turn_in_whole(i, talk, template, whole, context)
    spans = _spans_of_last(i, talk, template, through, context)
    end = spans[-1][1]
    if context is not None and not through.startswith(context):
        start = max(spans[0][0], _after_shared_header(i, talk, template, through, context))
        spans = [(start, spans[0][1]), *spans[1:]]
        moved_spans = [(a - start + len(context), b - start + len(context)) for a, b in spans]
        return _Turn(i, context + through[start:], moved_spans, in_whole=False, through=i + 1)
    if whole.startswith(through[:end]):
        return _Turn(i, through, spans, in_whole=True, through=i + 1)
    is_empty = not talk.messages[i].get("content", "").strip() and "tool_calls" not in talk.messages[i]
    # In an empty turn the header's own token would be taken for an end.
    shorter_end = None if is_empty else _without_last_end(through, spans, template)
    if shorter_end is not None and whole.startswith(through[:shorter_end]):
        return _Turn(i, through, [*spans[:-1], (spans[-1][0], shorter_end)], in_whole=True, through=i + 1)
    return _Turn(i, through, spans, in_whole=False, through=i + 1)


def _spans_of_last(i: int, talk: Conversation, template: ChatTemplate, through: str, context: str | None) -> list[Span]:
    """Where turn `i`, the last of its rendering `through`, is said, with what closes it."""
    part = talk.upto(i + 1)
    end = len(through.rstrip())
    if template.has_marks(part):
        marks = _marks_of_last(part, template, through, context)
        if marks:
            start, marked_end = marks[-1]
            last_end = max(marked_end, end) if _is_open(through, marks[-1], template) else marked_end
            return [*marks[:-1], (start, last_end)]
    if context is not None and through.startswith(context):
        return [(min(len(context), end), end)]
    places = template.places(part, through)
    place = places[i]
    if context is not None:
        earliest = max((other[1] for other in places[:i] if other), default=0)
        start = _after_shared_header(i, talk, template, through, context) or _after_prompt(
            through, context, earliest, place[0] if place else end
        )
    elif place is not None:
        start = _after_header(part, template, through, i)
    else:
        raise _not_told_apart(talk, i)
    return [(start, end)]


def _after_shared_header(i: int, talk: Conversation, template: ChatTemplate, through: str, context: str) -> int:
    """Where the turn begins in `through` behind what it shares with the prompt, which goes on otherwise (with an empty thought);
    0 where the messages before the turn are shown otherwise too."""
    before = template.maybe(talk.upto(i)) or ""
    if not before or not (context.startswith(before) and through.startswith(before)):
        return 0
    shared = len(os.path.commonprefix([context, through]))
    place = template.places(talk.upto(i + 1), through)[i]
    if place and place[0] <= shared:
        return place[0]
    while shared > len(before) and not through[shared - 1].isspace() and not template.ends.search(through[:shared]):
        shared -= 1  # two tokens may begin alike
    return shared


def _marks_of_last(part: Conversation, template: ChatTemplate, through: str, context: str | None) -> list[Span]:
    """The template's marks of the last message."""
    marks = template.marks(part, through)
    if not marks:
        return []
    earlier = [message for message in part.messages[:-1] if message["role"] == "assistant"]
    marks_before = (
        template.marks(part.upto(len(part.messages) - 1), context, prompt=True) if context is not None else None
    )
    if marks_before is not None:
        return marks[len(marks_before) :]
    if not earlier:
        return marks
    return marks[-1:] if len(marks) == len(earlier) + 1 else []


def _is_open(text: str, span: Span, template: ChatTemplate) -> bool:
    return template.ends.search(text[span[0] : span[1]]) is None


def _after_prompt(through: str, context: str, earliest: int, limit: int) -> int:
    """Where the turn begins in `through` if `context` is no beginning of it: behind what both end the prompt with."""
    backwards = context[: -_REACH - 1 : -1]
    longest, start = 0, limit
    for place in range(limit, earliest - 1, -1):
        shared = len(os.path.commonprefix([backwards, through[max(0, place - _REACH) : place][::-1]]))
        if shared > longest:
            longest, start = shared, place
    return start


def _after_header(talk: Conversation, template: ChatTemplate, text: str, i: int) -> int:
    """Where turn `i` begins in `text`: behind the usual generation prompt, or where its content begins."""
    places = template.places(talk, text)
    place = places[i]
    if place is None:
        raise _not_told_apart(talk, i)
    header, _ = template.usual(talk)
    earliest = max((other[1] for other in places[:i] if other), default=0)
    header_start = text.rfind(header, earliest, place[0]) if header.strip() else -1
    if header_start >= 0:
        return header_start + len(header)
    return place[0]


def _turn_in_whole(i: int, talk: Conversation, template: ChatTemplate, whole: str, context: str | None) -> _Turn:
    """The turn of a conversation whose beginning does not render, found in the whole by marks or by its content."""
    if template.has_marks(talk):
        marks = template.marks(talk, whole) or []
        assistants = [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if len(marks) == len(assistants):
            start, end = marks[assistants.index(i)]
            span = (start, _through_closing(template, talk, whole, start, end))
            return _Turn(i, whole, [span], in_whole=True, through=len(talk.messages))
    place = template.places(talk, whole)[i]
    if place is None or talk.messages[i].get("tool_calls"):
        raise _not_told_apart(talk, i)
    starts_alike = context is not None and whole.startswith(context) and len(context) <= place[0]
    start = len(context) if starts_alike and context is not None else _after_header(talk, template, whole, i)
    span = (start, _through_closing(template, talk, whole, start, place[1]))
    return _Turn(i, whole, [span], in_whole=True, through=len(talk.messages))


def _through_closing(template: ChatTemplate, talk: Conversation, text: str, start: int, end: int) -> int:
    _, closing = template.usual(talk)
    if template.ends.search(text[start:end]):
        return end
    for blanks in (0, len(text[end:]) - len(text[end:].lstrip())):
        if closing and text.startswith(closing.lstrip() if blanks else closing, end + blanks):
            return end + blanks + len(closing.lstrip() if blanks else closing)
    return end


def _without_last_end(through: str, spans: list[Span], template: ChatTemplate) -> int | None:
    """The end of a turn without the token that closes the whole conversation, where another one closes the turn."""
    start, end = spans[-1]
    last_token = template.ends.search(through[start:end])
    if last_token is None:
        return None
    text_before = through[start : start + last_token.start()].rstrip()
    return start + len(text_before) if template.ends.search(text_before) else None


def _close(passage: Passage, template: ChatTemplate) -> None:
    """Every span ends with what ends the turn: the next role's token, or the end of sequence, where nothing else does."""
    text = passage.text
    for number, (start, end) in enumerate(passage.spans):
        if not _is_open(text, (start, end), template):
            continue
        following = template.follows.match(text, end)
        if following:
            passage.spans[number] = (start, following.end())
        elif not text[end:].strip():
            if template.tokenizer.eos_token_id is None:
                passage.remarks += (NEVER_ENDS,)
            else:
                passage.text, passage.ended = text[:end], True
    if not passage.ended and not any(template.ends.search(text[a:b]) for a, b in passage.spans):
        passage.remarks = tuple({*passage.remarks, NEVER_ENDS})


def _is_whole(talk: Conversation, turn: _Turn) -> bool:
    """Whether all that the assistant says is in the trained text, blanks aside.

    Raises:
        UsageError: a tool call is not there.
    """
    message = talk.messages[turn.index]
    said = "".join(turn.text[start:end] for start, end in turn.spans)
    legacy = [message["function_call"]] if "function_call" in message else []
    for call in message.get("tool_calls", []) + legacy:
        name = call.get("function", call)["name"]
        if name not in said:
            raise UsageError(
                f"{talk}: the chat template does not render the tool call {name!r}, which would train an empty answer; "
                "accepted: a template that renders tool_calls"
            )
    return _stands_in(message.get("content", ""), said)


def _shows_reasoning(talk: Conversation, turn: _Turn) -> bool:
    message = talk.messages[turn.index]
    reasoning = next((message[name] for name in REASONING if name in message), "")
    said = "".join(turn.text[start:end] for start, end in turn.spans)
    return not isinstance(reasoning, str) or _stands_in(reasoning, said)


def _shows_what_was_asked(talk: Conversation, passage: Passage) -> bool:
    """Whether every message before the last trained one that is not the assistant's stands in the text."""
    messages = talk.messages[: max(i for i in range(passage.through) if talk.trained[i])]
    return all(
        _stands_in(message.get("content", ""), passage.text) for message in messages if message["role"] != "assistant"
    )


def _stands_in(content: str, text: str) -> bool:
    return content.strip() in text or re.sub(r"\s+", "", content) in re.sub(r"\s+", "", text)


def _not_told_apart(talk: Conversation, i: int) -> UsageError:
    return UsageError(
        f"{talk}: what the assistant says in message {i + 1} cannot be told from the rest of what the chat template renders; "
        "accepted: a template that marks it by {% generation %}, or that shows the content as it stands"
    )
