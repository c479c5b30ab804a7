"""Conversations of one shape are told apart once: who speaks in which order, with which tools.

What a template makes of a shape is learned from a conversation whose contents are single symbols. Later ones of the shape are
filled in, and proven: what is filled in for the whole conversation must be what the template renders. A template may look
into a content (`'</think>' in content`, `content.strip()`): a content in which it could find something, or that begins or
ends with blanks, is not filled in but told apart by itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache

from dist_subspace.training.data.messages import Conversation
from dist_subspace.training.data.template import ChatTemplate, Span, parsed
from dist_subspace.training.data.turns import Passage, passages

SYMBOLS = range(0xF0000, 0xF0400)  # private code points, other ones than those that mark places
MOST = 4096  # shapes that are remembered
STRIPS = ("strip", "lstrip", "rstrip")


@dataclass(frozen=True)
class _Text:
    """A text with places to fill in: literals[0], content number[0], literals[1], ..."""

    literals: list[str]
    numbers: list[int]
    spans: list[tuple[tuple[int, int], tuple[int, int]]]
    """Begin and end of each span: (fillings before it, characters of literals before it)."""

    def filled(self, contents: list[str]) -> str:
        parts = [self.literals[0]]
        for number, literal in zip(self.numbers, self.literals[1:]):
            parts += (contents[number], literal)
        return "".join(parts)

    def places(self, contents: list[str]) -> tuple[list[Span], list[int]]:
        """(the spans, where the contents begin) in the text that is filled in."""
        ends = [0]
        for number in self.numbers:
            ends.append(ends[-1] + len(contents[number]))
        starts, literal = [], 0
        for filled, text in zip(ends, self.literals[:-1]):
            literal += len(text)
            starts.append(filled + literal)
        return [(ends[a] + x, ends[b] + y) for (a, x), (b, y) in self.spans], starts


@dataclass(frozen=True)
class _Recipe:
    whole: _Text
    passages: list[tuple[_Text, Passage]]


class Recipes:
    """`passages` of turns.py, by what is known of a conversation's shape."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._known: dict[str, _Recipe] = {}

    def passages(self, talk: Conversation) -> list[Passage]:
        """As `turns.passages`.

        Raises:
            UsageError: as there.
        """
        key = self._shape(talk)
        if key is None:
            return passages(talk, self.template)
        recipe = self._known.get(key)
        if recipe is None:
            if len(self._known) >= MOST:
                self._known.clear()
            recipe = self._known[key] = self._learned(talk)
        contents = [message["content"] for message in talk.messages]
        if not recipe.passages or recipe.whole.filled(contents) != self.template.text(talk):
            return passages(talk, self.template)
        return [_filled(text, passage, contents) for text, passage in recipe.passages]

    def _shape(self, talk: Conversation) -> str | None:
        """What the rendering depends on beside the contents; None where it may depend on the contents."""
        looks_for, names = _literals(self.template.source(talk))
        special = self.template.any_special
        contents = [message.get("content") for message in talk.messages]
        if any(len(message) != 2 for message in talk.messages) or len(set(contents)) < len(contents):
            return None
        for content in contents:
            if content is None or not content or content != content.strip() or content in names:
                return None
            if looks_for.search(content) or special.search(content):
                return None
        roles = [message["role"] for message in talk.messages]
        return json.dumps([roles, talk.trained, talk.tools, talk.documents, talk.options], sort_keys=True, default=str)

    def _learned(self, talk: Conversation) -> _Recipe:
        symbols = [chr(code) for code in SYMBOLS[: len(talk.messages)]]
        if len(symbols) < len(talk.messages):
            return _Recipe(_Text([""], [], []), [])
        messages = [message | {"content": symbol} for message, symbol in zip(talk.messages, symbols)]
        symbolic = replace(talk, messages=messages)
        whole = _parted(self.template.text(symbolic), [])
        found = passages(symbolic, self.template)
        return _Recipe(whole, [(_parted(passage.text, passage.spans), passage) for passage in found])


def _filled(text: _Text, passage: Passage, contents: list[str]) -> Passage:
    spans, starts = text.places(contents)
    return Passage(text.filled(contents), spans, passage.through, passage.ended, passage.remarks, starts)


def _parted(text: str, spans: list[Span]) -> _Text:
    symbols = [(place, ord(c) - SYMBOLS[0]) for place, c in enumerate(text) if ord(c) in SYMBOLS]
    literals, start = [], 0
    for place, _ in symbols:
        literals.append(text[start:place])
        start = place + 1

    def counted(place: int) -> tuple[int, int]:
        before = sum(1 for symbol, _ in symbols if symbol < place)
        return before, place - before

    return _Text(
        [*literals, text[start:]], [number for _, number in symbols], [(counted(a), counted(b)) for a, b in spans]
    )


@cache
def _literals(template: str) -> tuple[re.Pattern[str], frozenset[str]]:
    """(what a content may not hold, what it may not be) so that the template makes of it what it makes of a symbol."""
    from jinja2 import nodes

    tree = parsed(template)
    everything = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    asked = set()
    for test in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in test.ops):
            asked |= _strings(test)
    for call in tree.find_all((nodes.Call, nodes.Filter, nodes.Test)):
        strips = isinstance(call, nodes.Call) and isinstance(call.node, nodes.Getattr) and call.node.attr in STRIPS
        found = {text for argument in call.args for text in _strings(argument)}
        asked |= {text for text in found if not (strips and not text.strip())}
    marks = [f"[{chr(SYMBOLS[0])}-{chr(SYMBOLS[-1])}]", *(re.escape(text) for text in sorted(asked) if text)]
    return re.compile("|".join(marks)), frozenset(everything)


def _strings(node: object) -> set[str]:
    from jinja2 import nodes

    assert isinstance(node, nodes.Node)
    own = {node.value} if isinstance(node, nodes.Const) and isinstance(node.value, str) else set()
    return own | {c.value for c in node.find_all(nodes.Const) if isinstance(c.value, str)}
