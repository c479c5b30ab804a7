"""Texts of one shape, filled with different contents: what stands between the contents is tokenised once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_subspace.training.data.masked import MaskedEncoder, Tokens

Span = tuple[int, int]
MOST = 8192  # patterns whose ids are remembered


@dataclass(frozen=True, eq=False)
class Pattern:
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

    def spans_of(self, place: int) -> list[Span]:
        """What of literal `place` lies in spans, in characters of it."""
        start = sum(map(len, self.literals[:place]))
        length, spans = len(self.literals[place]), []
        for (a, x), (b, y) in self.spans:
            begin, end = (0 if a < place else x - start), (length if b > place else y - start)
            if a <= place <= b and begin < end:
                spans.append((begin, end))
        return spans

    def is_trained(self, place: int) -> bool:
        """Whether the content that follows literal `place` lies in a span."""
        return any(a <= place < b for (a, _), (b, _) in self.spans)


@dataclass(frozen=True)
class _Slot:
    """A content's place: ids and flags of the literal before it, the piece of that literal that ends there."""

    ids: bytes
    flags: bytes
    head: str
    number: int
    flag: bytes


@dataclass(frozen=True)
class _LearnedPattern:
    slots: list[_Slot]
    ids: bytes
    flags: bytes


class PatternEncoder:
    """Ids and masks of filled patterns, equal to what `masked` gives for their texts."""

    def __init__(self, masked: MaskedEncoder) -> None:
        self.masked = masked
        self._known: dict[Pattern, _LearnedPattern | None] = {}

    def tokens(self, filled: list[tuple[Pattern, list[str]]]) -> list[Tokens | None]:
        """What `MaskedEncoder.tokens` gives for each text; None where the text is not surely parted at the contents."""
        learned_patterns = [self._usable(pattern, contents) for pattern, contents in filled]
        needed_contents = {
            contents[slot.number]
            for learned, (_, contents) in zip(learned_patterns, filled)
            if learned
            for slot in learned.slots
        }
        texts = list(needed_contents)
        ids = {text: array.tobytes() for text, array in zip(texts, self.masked.ids(texts))}
        return [
            _filled_tokens(learned, contents, ids) if learned else None
            for learned, (_, contents) in zip(learned_patterns, filled)
        ]

    def _usable(self, pattern: Pattern, contents: list[str]) -> _LearnedPattern | None:
        if pattern not in self._known:
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[pattern] = self._learned(pattern)
        learned = self._known[pattern]
        if learned is None:
            return None
        parts_before = self.masked.parting.parts_before
        return learned if all(parts_before(slot.head, contents[slot.number]) for slot in learned.slots) else None

    def _learned(self, pattern: Pattern) -> _LearnedPattern | None:
        borders = self.masked.parting.borders if self.masked.tokenizer.is_fast else None
        if borders is None or not all(borders.match(literal) for literal in pattern.literals[1:]):
            return None
        marked: list[Any] = [(text, pattern.spans_of(place), []) for place, text in enumerate(pattern.literals)]
        literal_tokens = [
            (ids.astype(np.int32).tobytes(), flags.tobytes()) for ids, flags in self.masked.tokens(marked)
        ]
        slots = []
        for place, (number, literal) in enumerate(zip(pattern.numbers, pattern.literals)):
            head = literal[max((match.start() for match in borders.finditer(literal)), default=0) :]
            slots.append(_Slot(*literal_tokens[place], head, number, b"\x01" if pattern.is_trained(place) else b"\x00"))
        return _LearnedPattern(slots, *literal_tokens[-1])


def _filled_tokens(learned: _LearnedPattern, contents: list[str], ids_of_content: dict[str, bytes]) -> Tokens:
    ids: list[bytes] = []
    flags: list[bytes] = []
    for slot in learned.slots:
        content = ids_of_content[contents[slot.number]]
        ids += (slot.ids, content)
        flags += (slot.flags, slot.flag * (len(content) // 4))
    ids.append(learned.ids)
    flags.append(learned.flags)
    return np.frombuffer(b"".join(ids), np.int32), np.frombuffer(b"".join(flags), bool)
