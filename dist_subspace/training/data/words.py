"""Ids of texts word by word, for byte-level tokenizers whose rules always part a text before a blank.

A language has few different words: each is tokenised once, and a text is the ids of its words, one after the other. That
takes a fraction of what the tokenizer takes for the text. A place is sure where a blank follows a character that is none:
no rule of the table below goes on over it, so what stands before ends there, and what follows is read from there on alone.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
RULES = {
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    CONTRACTIONS,
    r"'(?i:[sdmt]|ll|ve|re)",
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?",
    r" ?\p{N}+",
    r"\p{N}+",
    r"\p{N}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
}
"""Alternatives of the expressions of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen 2 to 3.5 and their like. Each takes a blank at its
beginning only, or takes nothing but white space; none of them looks back, or beyond a character that is no white space."""
MOST = 200_000  # words that are remembered
LONGEST = 32  # characters of a word that is remembered
CHECKED = 64  # texts of the first call that are compared with what the tokenizer makes of them


class Words:
    """Ids of texts without marks, as (n,) int32 arrays. `backend`: a `tokenizers.Tokenizer` for which `part_at_blanks`."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._first: dict[str, bytes] = {}
        self._later: dict[str, bytes] = {}
        self._is_checked = self._is_off = False

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text."""
        if not self._is_checked:
            self._check(texts[:CHECKED])
        if self._is_off:
            return [np.asarray(ids, np.int32) for ids in self._encoded(texts)]
        return self._by_words(texts)

    def _check(self, texts: list[str]) -> None:
        """A tokenizer that does something else with these texts than its description says is taken as it is."""
        expected = self._encoded(texts)
        self._is_off = any(by_words.tolist() != ids for by_words, ids in zip(self._by_words(texts), expected))
        self._is_checked = True

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _by_words(self, texts: list[str]) -> list[np.ndarray]:
        ids_of_texts = [self._remembered(text) for text in texts]
        parted = {place: _split_at_blanks(texts[place]) for place, ids in enumerate(ids_of_texts) if ids is None}
        if parted:
            learned = self._learned({word for words in parted.values() for word in words})
            for place, words in parted.items():
                ids_of_texts[place] = b"".join(map(learned.__getitem__, words))
        return [np.frombuffer(ids, np.int32) for ids in ids_of_texts if ids is not None]

    def _remembered(self, text: str) -> bytes | None:
        first, blank, rest = text.partition(" ")
        try:
            head = self._first[first]
            return head + b"".join(map(self._later.__getitem__, rest.split(" "))) if blank else head
        except KeyError:
            return None

    def _learned(self, words: set[str]) -> dict[str, bytes]:
        """The ids of each word; a later one begins with its blank."""
        if len(self._first) + len(self._later) + len(words) > MOST:
            self._first.clear()
            self._later.clear()
        known = {word: self._later.get(word[1:]) if word[:1] == " " else self._first.get(word) for word in words}
        missing = [word for word, ids in known.items() if ids is None]
        learned = {word: np.asarray(ids, np.int32).tobytes() for word, ids in zip(missing, self._encoded(missing))}
        for word, ids in learned.items():
            if len(word) <= LONGEST and _ends_surely(word):
                if word[0] == " ":
                    self._later[word[1:]] = ids
                else:
                    self._first[word] = ids
        return {word: ids for word, ids in known.items() if ids is not None} | learned


def part_at_blanks(body: dict[str, Any]) -> bool:
    """Whether a tokenizer with this description (its JSON) parts every text before a blank that follows no blank."""
    model, normalizer, steps = body["model"], body.get("normalizer"), pre_tokenizers(body)
    tokens = [token for token in body.get("added_tokens", []) if token["content"]]
    return (
        (normalizer is None or normalizer.get("type") == "NFC")
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and any(step["type"] == "ByteLevel" for step in steps)
        and not any(step.get("add_prefix_space", True) for step in steps if step["type"] == "ByteLevel")
        and _parts_first(steps[0])
        and not any(token.get("rstrip") or token.get("single_word") for token in tokens)
        and not any(re.search(r"\S\s", token["content"]) for token in tokens)
    )


def pre_tokenizers(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps by which a tokenizer with this description parts a text into words."""
    pre_tokenizer = body.get("pre_tokenizer")
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _parts_first(step: dict[str, Any]) -> bool:
    """Whether the first step parts there; the later ones see what it leaves together."""
    if step["type"] == "ByteLevel":
        return step.get("use_regex", True)
    if step["type"] != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return False
    return set(_alternatives(step["pattern"].get("Regex", ""))) <= RULES


def _alternatives(expression: str) -> list[str]:
    """The expression parted at each `|` that stands in no group."""
    alternatives, depth = [""], 0
    for symbol in re.findall(r"\\.|\[(?:\\.|[^\]\\])*\]|.", expression, re.DOTALL):
        depth += (symbol == "(") - (symbol == ")")
        if symbol == "|" and not depth:
            alternatives.append("")
        else:
            alternatives[-1] += symbol
    return alternatives


def _split_at_blanks(text: str) -> list[str]:
    """The text's words, each but the first with the blanks before it."""
    first, *rest = text.split(" ")
    words, is_sure = [first], _ends_surely(first)
    for word in rest:
        if is_sure:
            words.append(" " + word)
        else:
            words[-1] += " " + word
        is_sure = _ends_surely(word)
    return words


def _ends_surely(word: str) -> bool:
    last = word[-1:]
    return "!" <= last <= "~" or last.isalnum()
