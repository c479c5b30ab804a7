"""A tokenizer's chat template: what it renders, which marks it has, how a turn begins and ends in it."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.loading.template_internals import rendered_with_marks
from dist_subspace.training.data.given import AS_READ, Form, fitting, in_form, traits
from dist_subspace.training.data.messages import Conversation, Message

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + (eos_token or '<|im_end|>') }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Taken where a tokenizer has none: ChatML, but the assistant ends with the end of sequence, because the vocabulary
is not grown and `generate` stops there."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE = range(0xE000, 0xF8FF)
"""Code points that mean nothing: two for each message mark where its content stands."""
Span = tuple[int, int]


def give_chat_template(tokenizer: Any) -> None:
    """A tokenizer without a chat template gets the default one, so that it is saved beside the adapter."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE


def said_of_default(tokenizer: Any) -> list[str]:
    """What a run must say where the default template is taken."""
    if tokenizer.chat_template != DEFAULT_CHAT_TEMPLATE:
        return []
    vocabulary = tokenizer.get_vocab()
    missing = [mark for mark in ("<|im_start|>", "<|im_end|>") if mark not in vocabulary]
    not_known = f"; {' and '.join(missing)} are not in its vocabulary, so each is several tokens" if missing else ""
    return [f"the tokenizer has no chat template: ChatML is taken, and saved beside the adapter{not_known}"]


class ChatTemplate:
    """The template of a tokenizer, for conversations. Positions are in characters of a rendered text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._forms: dict[tuple[str, bool, bool], Form] = {}

    def text(self, talk: Conversation, prompt: bool = False) -> str:
        """The conversation as `apply_chat_template` renders it; with `prompt`, up to where the assistant is to speak.

        Raises:
            UsageError: the template refuses these messages.
        """
        try:
            return self._rendered(talk, prompt)
        except Exception as error:  # a template raises what it likes for roles or orders that it does not take
            raise UsageError(f"{talk}: the tokenizer's chat template refuses these messages: {error}") from error

    def maybe(self, talk: Conversation, prompt: bool = False) -> str | None:
        """What `text` gives; None where the template refuses (many take none that ends before the first question)."""
        if not talk.messages:
            return None
        try:
            return self._rendered(talk, prompt)
        except Exception:
            return None

    def has_marks(self, talk: Conversation) -> bool:
        """Whether the template says itself what the assistant's are (`{% generation %}`)."""
        return _is_marked(self.source(talk))

    def source(self, talk: Conversation) -> str:
        """The template's text: a tokenizer may have one of its own for conversations with tools."""
        return self.tokenizer.get_chat_template(None, talk.tools)

    def reads(self, name: str, talk: Conversation) -> bool:
        """Whether the template asks for the variable."""
        return name in _variables(self.source(talk))

    def marks(self, talk: Conversation, text: str, prompt: bool = False) -> list[Span] | None:
        """The spans of the template's own marks in `text`, its rendering; None where they cannot be had."""
        try:
            variables = self.tokenizer.special_tokens_map | talk.options
            rendered, spans = rendered_with_marks(
                self._in_its_form(talk), self.source(talk), talk.tools, talk.documents, prompt, variables
            )
        except Exception:  # as in `maybe`
            return None
        return spans if rendered == text else None

    def places(self, talk: Conversation, text: str, prompt: bool = False) -> list[Span | None]:
        """Where each message's content stands in `text`, its rendering: found by marks set into the contents, and proven:
        without the marks the rendering is `text`. None for a content that is not there as a whole."""
        free = self._free_marks(talk, text)
        marked, pairs = [], []
        for message in talk.messages:
            content = message.get("content", "")
            pair = (next(free), next(free)) if content.strip() else None
            pairs.append(pair)
            marked.append(message | {"content": _between(content, *pair)} if pair else message)
        rendered = self.maybe(replace(talk, messages=marked), prompt)
        used = {mark for pair in pairs if pair for mark in pair}
        if rendered is None or "".join(character for character in rendered if character not in used) != text:
            return [None] * len(pairs)
        positions: dict[str, list[int]] = {}
        place = 0
        for character in rendered:
            if character in used:
                positions.setdefault(character, []).append(place)
            else:
                place += 1
        return [_span_between(positions, pair) for pair in pairs]

    def _free_marks(self, talk: Conversation, text: str) -> Any:
        return (chr(code) for code in PRIVATE if chr(code) not in text)

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """A special token at the end of a text, blanks aside: what `generate` can stop at."""
        return re.compile(rf"(?:{self._special})\s*\Z")

    @cached_property
    def follows(self) -> re.Pattern[str]:
        """A special token, perhaps after blanks."""
        return re.compile(rf"\s*(?:{self._special})")

    @cached_property
    def special_tokens(self) -> list[str]:
        """The special tokens, the longest first."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        tokens = set(self.tokenizer.all_special_tokens) | {token.content for token in added if token.special}
        return [token for token in sorted(tokens, key=len, reverse=True) if token]

    @cached_property
    def _special(self) -> str:
        return "|".join(map(re.escape, self.special_tokens)) or r"(?!)"

    def usual(self, talk: Conversation) -> tuple[str, str]:
        """(what stands before an answer and is the prompt's, what closes an answer), as a plain question shows them."""
        question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
        asked = replace(talk, messages=[question], trained=[False], tools=None, documents=None)
        answered = replace(asked, messages=[question, answer], trained=[False, True])
        prompt, bare, whole = self.maybe(asked, prompt=True), self.maybe(asked), self.maybe(answered)
        header = prompt[len(os.path.commonprefix([bare, prompt])) :] if prompt and bare else ""
        place = self.places(answered, whole)[1] if whole else None
        return header, whole[place[1] :].rstrip() if whole and place else ""

    def _rendered(self, talk: Conversation, prompt: bool) -> str:
        return self._applied(self._in_its_form(talk), talk, prompt)

    def _in_its_form(self, talk: Conversation) -> list[Message]:
        """The messages in the form in which the template takes them, which is found once."""
        key = (self.source(talk), *traits(talk.messages))
        if key not in self._forms:
            form = fitting(talk.messages, lambda messages: self._maybe_applied(messages, talk))
            if form is None:
                return talk.messages
            self._forms[key] = form
        form = self._forms[key]
        return talk.messages if form == AS_READ else in_form(talk.messages, form)

    def _maybe_applied(self, messages: list[Message], talk: Conversation) -> str | None:
        try:
            return self._applied(messages, talk, False)
        except Exception:  # as in `maybe`
            return None

    def _applied(self, messages: list[Message], talk: Conversation, prompt: bool) -> str:
        options: dict[str, Any] = {"tools": talk.tools, "documents": talk.documents} | talk.options
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)


@cache
def _variables(template: str) -> frozenset[str]:
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(parsed(template)))


@cache
def _is_marked(template: str) -> bool:
    return GENERATION.search(template) is not None


def parsed(template: str) -> Any:
    """The template as jinja's syntax tree."""
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension

    class Marks(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja declares it on the instance)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = Environment(extensions=[Marks, "jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True)
    return environment.parse(template)


def _between(content: str, first: str, last: str) -> str:
    """The content between two marks, which stand within the blanks at both ends: many templates strip those."""
    inner = content.strip()
    start = content.index(inner)
    return content[:start] + first + inner + last + content[start + len(inner) :]


def _span_between(positions: dict[str, list[int]], pair: tuple[str, str] | None) -> Span | None:
    if pair is None or not all(len(positions.get(mark, [])) == 1 for mark in pair):
        return None
    start, end = positions[pair[0]][0], positions[pair[1]][0]
    return (start, end) if start < end else None
