"""Where a text may be parted so that the ids of the parts, one after the other, are the ids of the text.

Always before a special token that the tokenizer finds first of all. With a byte-level tokenizer also before a content, where its
rules part the text there anyway: they read from left to right, and what they make of the rest depends on the rest alone.
Then the same turn in many texts is tokenised once, and a span that begins with the content needs no positions.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

from dist_subspace.training.data.words import pre_tokenizers

WINDOW = 48  # characters beside a place that are looked at
LOOKED_AT = 4  # characters behind a place by whose kinds the rules decide on it
KINDS = {ord(c): kind for kind, some in zip("Aa0", (ascii_uppercase, ascii_lowercase, digits)) for c in some}
MOST = 100_000  # decisions that are remembered
NOT_LOCAL = re.compile(r"\(\?<|\\[bBAGzZK]|(?<!\[)\^|\$")
"""In a regular expression: looks back, or at where the text begins or ends."""


class Parting:
    """The places of one (fast) tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer.backend_tokenizer
        self._template_text = str(getattr(tokenizer, "chat_template", "")) + "".join(tokenizer.all_special_tokens)
        self._description = json.loads(self.backend.to_str())
        self._decided_by_kinds: dict[tuple[str, str], bool] = {}
        self._decided_by_text: dict[tuple[str, str], bool] = {}

    def edges(self, text: str, hints: Iterable[int]) -> list[int]:
        """0, the places at which `text` is parted, its length. `hints`: where contents and spans begin."""
        starts = [0] + ([match.start() for match in self.borders.finditer(text)] if self.borders else [])
        edges = {len(text), *starts}
        if self._is_local:
            for place in hints:
                start = starts[bisect_right(starts, place) - 1]
                if start < place < len(text) and self.parts_before(text[start:place], text[place : place + WINDOW]):
                    edges.add(place)
        return sorted(edges)

    @cached_property
    def borders(self) -> re.Pattern[str] | None:
        """Special tokens before which a text may be parted.

        They are found before the text is normalised, and take no blanks from their left; no other token overlaps them.
        Behind such a token nothing is the begin of a text any more, so it stays with what follows.
        """
        contents = [
            token["content"]
            for token in self._tokens
            if token["content"] in self._template_text
            and token.get("special")
            and not (token.get("normalized", True) or token.get("lstrip") or token.get("single_word"))
            and not token["content"].isspace()
            and not any(_overlaps(token["content"], other["content"]) for other in self._tokens if other is not token)
        ]
        return re.compile("|".join(map(re.escape, contents))) if contents else None

    @cached_property
    def _tokens(self) -> list[dict[str, Any]]:
        return [token for token in self._description.get("added_tokens", []) if token["content"]]

    @cached_property
    def _added(self) -> re.Pattern[str]:
        contents = sorted((token["content"] for token in self._tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    @cached_property
    def _is_local(self) -> bool:
        """Whether the tokenizer is byte-level, by rules that look at what follows only."""
        normalizer, model = self._description.get("normalizer"), self._description["model"]
        plain = normalizer is None or normalizer.get("type") == "NFC"
        longest = max((len(token["content"]) for token in self._tokens), default=0)
        steps = pre_tokenizers(self._description)
        byte_level = any(step["type"] == "ByteLevel" for step in steps)
        return (
            plain
            and byte_level
            and all(map(_looks_ahead, steps))
            and model.get("type") == "BPE"
            and not model.get("dropout")
            and longest <= WINDOW
            and len(self._tokens) < 2000
        )

    def parts_before(self, head: str, rest: str) -> bool:
        """Whether a text is parted between `head`, which begins where it is parted in any case, and `rest`."""
        key = (head, rest[:LOOKED_AT])
        is_parted = self._decided_by_text.get(key)
        if is_parted is None:
            if len(self._decided_by_text) > MOST:
                self._decided_by_text.clear()
            is_parted = self._decided_by_text[key] = self._decided(head, rest)
        return is_parted

    def _decided(self, head: str, rest: str) -> bool:
        if not self._is_local or not head or len(head) > WINDOW or not rest[:1].isalnum():
            return False
        kind = rest[:LOOKED_AT].translate(KINDS)
        if not kind[0].isascii():  # a character that might be one with the one before
            return False
        key = (head, kind)
        if key not in self._decided_by_kinds:
            if len(self._decided_by_kinds) > MOST:
                self._decided_by_kinds.clear()
            self._decided_by_kinds[key] = self._parts_between(head, rest[:WINDOW])
        return self._decided_by_kinds[key]

    def _parts_between(self, head: str, rest: str) -> bool:
        last_token_end = max((match.end() for match in self._added.finditer(head)), default=0)
        for token in self._tokens:  # one that begins before the place and ends behind it
            content = token["content"]
            if any(head.endswith(content[:n]) for n in range(1, len(content))):
                return False
        if last_token_end == len(head):
            return True
        window = head[last_token_end:] + rest
        return any(
            end == len(head) - last_token_end for _, (_, end) in self.backend.pre_tokenizer.pre_tokenize_str(window)
        )


def _looks_ahead(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space", True)
    if step["type"] == "Split":
        expression = step["pattern"].get("Regex")
        return expression is not None and NOT_LOCAL.search(expression) is None
    return step["type"] == "Digits"


def _overlaps(token: str, other: str) -> bool:
    if token in other or other in token:
        return True
    return any(other.endswith(token[:n]) or token.endswith(other[:n]) for n in range(1, min(len(token), len(other))))
