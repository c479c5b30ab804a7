"""Texts with marked spans to token ids with a mask, by the tokenizer's own positions of tokens in the text.

A text is tokenised in pieces where it may be parted (parting.py): the same turn in many texts is tokenised once.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from dist_subspace.training.data.parting import Parting
from dist_subspace.training.data.words import Words, part_at_blanks

Span = tuple[int, int]
Marked = tuple[str, list[Span], list[int]]
Tokens = tuple[np.ndarray, np.ndarray]


class MaskedEncoder:
    """Ids of texts as the tokenizer gives them without marks of its own, and which of them lie in given spans."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def tokens(self, texts: list[Marked]) -> list[Tokens]:
        """((n,) int32 ids, (n,) bool: the token has characters of a span) of each (text, spans in characters, places where
        contents begin: the same content stands in several texts)."""
        if not self.tokenizer.is_fast:
            return [self._by_beginnings(text, spans) for text, spans, _ in texts]
        parted = [list(self._pieces(*marked)) for marked in texts]
        tokens_of_piece = self._encoded({piece for pieces in parted for piece in pieces})
        return [_joined([tokens_of_piece[piece] for piece in pieces]) for pieces in parted]

    def _pieces(self, text: str, spans: list[Span], contents: list[int]) -> Any:
        """(piece, spans in it): () where there are none, the whole piece as (0, its length)."""
        for start, end in pairwise(self.parting.edges(text, [*contents, *(span[0] for span in spans)])):
            inside = tuple((max(a, start) - start, min(b, end) - start) for a, b in spans if a < end and b > start)
            yield text[start:end], inside

    def _encoded(self, pieces: set[tuple[str, tuple[Span, ...]]]) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
        partly_marked = [piece for piece in pieces if piece[1] and piece[1] != ((0, len(piece[0])),)]
        other_texts = list({text for text, _ in pieces} - {text for text, _ in partly_marked})
        partly_marked_texts = list({text for text, _ in partly_marked})
        encodings = dict(zip(partly_marked_texts, self._called(partly_marked_texts))) if partly_marked_texts else {}
        ids = {text: np.asarray(encoding.ids, np.int32) for text, encoding in encodings.items()}
        ids |= zip(other_texts, self.ids(other_texts))
        tokens_of_piece = {}
        for text, spans in pieces:
            flags = np.zeros(len(ids[text]), bool)
            if spans == ((0, len(text)),):
                flags[:] = True
            else:
                for span in spans:
                    flags[slice(*_tokens_of(encodings[text], span))] = True
            tokens_of_piece[text, spans] = ids[text], flags
        return tokens_of_piece

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """(n,) int32 ids of each text, of a tokenizer that has positions."""
        if texts and self._words is not None:
            return self._words.ids(texts)
        return [np.asarray(encoding.ids, np.int32) for encoding in self._encode(texts)]

    def _encode(self, texts: list[str]) -> list[Any]:
        if not texts:
            return []
        if self._is_plain:
            return self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return self._called(texts)

    def _called(self, texts: list[str]) -> list[Any]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).encodings

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the backend alone gives the ids that a call of the tokenizer gives (some prepare the text first)."""
        probe = [
            f"  A b\n\n\tÉß İﬁ {token}x {token} \u200b日本 don't 12,345  "
            for token in self.tokenizer.all_special_tokens
        ]
        probe.append("  A b\n\n\tÉß İﬁ x \u200b日本 don't 12,345  ")
        called = self._called(probe)  # it also takes the backend's truncation and padding away
        direct = self.tokenizer.backend_tokenizer.encode_batch_fast(probe, add_special_tokens=False)
        return [encoding.ids for encoding in called] == [encoding.ids for encoding in direct]

    @cached_property
    def _words(self) -> Words | None:
        backend = self.tokenizer.backend_tokenizer
        return Words(backend) if self._is_plain and part_at_blanks(json.loads(backend.to_str())) else None

    @cached_property
    def parting(self) -> Parting:
        return Parting(self.tokenizer)

    def _by_beginnings(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of a tokenizer without positions: a token lies before a place if the text up to there begins with it."""
        places = [place for span in spans for place in span]
        encoded = self.tokenizer(
            [text, *(text[:place] for place in places)],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        ids, beginnings = list(encoded[0]), [list(beginning) for beginning in encoded[1:]]
        shared = [len(os.path.commonprefix([ids, beginning])) for beginning in beginnings]
        flags = np.zeros(len(ids), bool)
        for number in range(len(spans)):
            start, end = shared[2 * number], shared[2 * number + 1]
            # A token that reaches over the end of the span has characters of it.
            end += end < len(beginnings[2 * number + 1])
            flags[start:end] = True
        return np.asarray(ids, np.int32), flags


def _tokens_of(encoding: Any, span: Span) -> tuple[int, int]:
    """(first, behind the last) token that has characters of the span."""
    offsets = encoding.offsets
    touched = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    return (touched[0], touched[-1] + 1) if touched else (0, 0)


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not pieces:
        return np.zeros(0, np.int32), np.zeros(0, bool)
    return np.concatenate([ids for ids, _ in pieces]), np.concatenate([flags for _, flags in pieces])
