"""Conversations of one shape are told apart once: who speaks in which order, with which tools.

What a template makes of a shape is learned from a conversation whose contents are single symbols. Later ones of the shape are
filled in, and proven: what is filled in for the whole conversation must be what the template renders. A template may look
into a content (`'</think>' in content`, `content.strip()`): a content in which it could find something, or that begins or
ends with blanks, is not filled in but told apart by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

from dist_subspace.loading.template_internals import quick_rendering
from dist_subspace.training.data.messages import Conversation, Message
from dist_subspace.training.data.patterns import Pattern
from dist_subspace.training.data.template import ChatTemplate, Span, parsed
from dist_subspace.training.data.turns import Passage, passages

SYMBOLS = range(0xF0000, 0xF0400)  # private code points, other ones than those that mark places
MOST = 4096  # shapes that are remembered
STRIPS = ("strip", "lstrip", "rstrip")


@dataclass(frozen=True)
class _Recipe:
    whole: Pattern
    passages: list[tuple[Pattern, Passage]]
    rendered: Callable[[list[Message]], str] | None
    """Renders plain messages as the template does, sooner; None where it may not be used."""


class Recipes:
    """`passages` of turns.py, by what is known of a conversation's shape."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._recipes: dict[Hashable, _Recipe] = {}
        self._looked_for: dict[str, _LookedFor] = {}

    def passages(self, talk: Conversation) -> list[Passage]:
        """What `turns.passages` gives for the conversation.

        Raises:
            UsageError: where `turns.passages` raises it.
        """
        key = self._shape(talk)
        if key is None:
            return passages(talk, self.template)
        recipe = self._recipes.get(key)
        if recipe is None:
            if len(self._recipes) >= MOST:
                self._recipes.clear()
            recipe = self._recipes[key] = self._learned(talk)
        contents = [message["content"] for message in talk.messages]
        if not recipe.passages or recipe.whole.filled(contents) != self._text(talk, recipe):
            return passages(talk, self.template)
        return [_filled(text, passage, contents) for text, passage in recipe.passages]

    def _text(self, talk: Conversation, recipe: _Recipe) -> str:
        if recipe.rendered is not None:
            # What a template raises here it raises there, in our words.
            with contextlib.suppress(Exception):
                return recipe.rendered(talk.messages)
        return self.template.text(talk)

    def _shape(self, talk: Conversation) -> Hashable | None:
        """What the rendering depends on beside the contents; None where it may depend on the contents."""
        source = self.template.source(talk)
        contents = [message.get("content") for message in talk.messages]
        if any(len(message) != 2 for message in talk.messages) or len(set(contents)) < len(contents):
            return None
        looked_for = self._looked_for.get(source)
        if looked_for is None:
            looked_for = self._looked_for[source] = _LookedFor(source, self.template.special_tokens)
        if not all(content and content == content.strip() and not looked_for.is_in(content) for content in contents):
            return None
        roles = tuple([message["role"] for message in talk.messages])
        if _is_plain(talk):
            return source, roles, tuple(talk.trained)
        rest = [talk.tools, talk.documents, talk.options]
        return source, roles, tuple(talk.trained), json.dumps(rest, sort_keys=True, default=str)

    def _learned(self, talk: Conversation) -> _Recipe:
        symbols = [chr(code) for code in SYMBOLS[: len(talk.messages)]]
        if len(symbols) < len(talk.messages):
            return _Recipe(Pattern([""], [], []), [], None)
        messages = [message | {"content": symbol} for message, symbol in zip(talk.messages, symbols)]
        symbolic = replace(talk, messages=messages)
        whole = _pattern_of(self.template.text(symbolic), [])
        symbolic_passages = passages(symbolic, self.template)
        rendered = quick_rendering(self.template.tokenizer) if _is_plain(talk) else None
        if rendered is not None and rendered(talk.messages) != self.template.text(talk):
            rendered = None
        return _Recipe(
            whole, [(_pattern_of(passage.text, passage.spans), passage) for passage in symbolic_passages], rendered
        )


class _LookedFor:
    """What a content may not hold, or be, so that the template makes of it what it makes of a symbol."""

    def __init__(self, source: str, special: list[str]) -> None:
        looked_for, self.names = _literals(source)
        texts = [*sorted(looked_for), *special]
        marks = [f"[{chr(SYMBOLS[0])}-{chr(SYMBOLS[-1])}]", *map(re.escape, texts)]
        self._search = re.compile("|".join(marks)).search
        # Most contents hold none of these, which is known sooner than by the expression.
        groups = groupby(sorted(texts), key=lambda text: text[0])
        self._beginnings = [os.path.commonprefix(list(group)) for _, group in groups]

    def is_in(self, content: str) -> bool:
        if content in self.names:
            return True
        if content.isascii() and not any(beginning in content for beginning in self._beginnings):
            return False
        return self._search(content) is not None


def _is_plain(talk: Conversation) -> bool:
    """Whether there is nothing but roles and contents, of Python's own text."""
    if talk.tools is not None or talk.documents is not None or talk.options:
        return False
    return all(type(value) is str for message in talk.messages for value in message.values())


def _filled(text: Pattern, passage: Passage, contents: list[str]) -> Passage:
    spans, starts = text.places(contents)
    return Passage(
        text.filled(contents), spans, passage.through, passage.ended, passage.remarks, starts, (text, contents)
    )


def _pattern_of(text: str, spans: list[Span]) -> Pattern:
    symbols = [(place, ord(c) - SYMBOLS[0]) for place, c in enumerate(text) if ord(c) in SYMBOLS]
    literals, start = [], 0
    for place, _ in symbols:
        literals.append(text[start:place])
        start = place + 1

    def place_in_pattern(place: int) -> tuple[int, int]:
        before = sum(1 for symbol, _ in symbols if symbol < place)
        return before, place - before

    return Pattern(
        [*literals, text[start:]],
        [number for _, number in symbols],
        [(place_in_pattern(a), place_in_pattern(b)) for a, b in spans],
    )


@cache
def _literals(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """(texts that the template looks for in others, all of its texts), none of them empty."""
    from jinja2 import nodes

    tree = parsed(template)
    all_texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    looked_for = set()
    for comparison in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in comparison.ops):
            looked_for |= _strings(comparison)
    for call in tree.find_all((nodes.Call, nodes.Filter, nodes.Test)):
        is_strip = isinstance(call, nodes.Call) and isinstance(call.node, nodes.Getattr) and call.node.attr in STRIPS
        texts = {text for argument in call.args for text in _strings(argument)}
        looked_for |= {text for text in texts if not (is_strip and not text.strip())}
    return frozenset(filter(None, looked_for)), frozenset(filter(None, all_texts))


def _strings(node: object) -> set[str]:
    from jinja2 import nodes

    assert isinstance(node, nodes.Node)
    own_text = {node.value} if isinstance(node, nodes.Const) and isinstance(node.value, str) else set()
    return own_text | {constant.value for constant in node.find_all(nodes.Const) if isinstance(constant.value, str)}
