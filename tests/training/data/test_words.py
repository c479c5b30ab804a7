"""Ids of a text by its words are the ids of the text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from dist_subspace.training.data import words
from dist_subspace.training.data.words import Words, part_at_blanks
from tests.training.data.chat_for_tests import KINDS, chat_tokenizer

TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    "qwen2": rf"{ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}",
    "llama3": rf"{ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}",
    "gpt4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDING}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDING}?|\p{{N}}{{1,3}}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
BITS = [
    "fox",
    "The",
    "I'm",
    "don't",
    "x1",
    "12",
    "1234",
    "3.5",
    "(foo",
    "bar)",
    "...",
    "a\n\nb",
    "\n",
    "\t",
    "",
    "",
    "e\u0301",
]
BITS += [
    "Über",
    "家",
    "家族 ",
    "\u00a0",
    "\u2028",
    "👍",
    "👍🏽",
    "def f(x):\n    return",
    "\r\n",
    "'s",
    "ſ",
    "٣",
    "/",
    "//\n",
]
BITS += ["<|im_end|>", "<think>x", "\x1c", "\u0301", "İ", "_a", "-"]


def tokenizer_of(expression: str | None, **token: Any) -> Tokenizer:
    core = Tokenizer.from_str(chat_tokenizer("byte-level", "chatml").backend_tokenizer.to_str())
    if expression is not None:
        core.normalizer = normalizers.NFC()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])
    core.add_tokens([AddedToken("<think>", normalized=False, **token)])
    return core


def texts(seed: str, count: int) -> list[str]:
    draw = random.Random(seed)
    kinds = (BITS, BITS[:6], BITS[5:22])
    return [" ".join(draw.choices(draw.choice(kinds), k=draw.randint(1, 14))) for _ in range(count)]


def same(found: list[Any], core: Tokenizer, given: list[str]) -> None:
    for ids, text in zip(found, given, strict=True):
        assert ids.tolist() == core.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("name", [None, *SPLITS])
def test_words_give_the_ids_of_the_text(name: str | None) -> None:
    core = tokenizer_of(SPLITS[name] if name else None)
    assert part_at_blanks(json.loads(core.to_str()))
    by_words = Words(core)
    for number in range(6):  # what is learned from some is taken for others
        given = texts(f"{name} {number}", 400)
        same(by_words.ids(given), core, given)
        same(by_words._by_words(given), core, given)


def test_the_words_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST", 20)
    core = tokenizer_of(None)
    by_words = Words(core)
    for number in range(5):
        given = texts(f"many {number}", 30)
        same(by_words.ids(given), core, given)
    given = [f"w{number}" for number in range(60)]
    same(by_words.ids(given), core, given)
    same(by_words.ids(["a b"]), core, ["a b"])
    assert len(by_words._first) + len(by_words._later) <= 20


@pytest.mark.parametrize(
    "core",
    [
        tokenizer_of(SPLITS["qwen2"], rstrip=True),  # takes the blank that follows it
        tokenizer_of(SPLITS["qwen2"], single_word=True),
        tokenizer_of(r"\w+ \w+|\w+|[^\w]"),  # two words and the blank between them
        tokenizer_of(SPLITS["qwen2"] + r"|(?<=a) b"),
        *(chat_tokenizer(kind, "chatml").backend_tokenizer for kind in KINDS if kind != "byte-level"),
    ],
)
def test_a_tokenizer_that_does_not_surely_part_at_blanks_is_told(core: Tokenizer) -> None:
    assert not part_at_blanks(json.loads(core.to_str()))


def test_a_tokenizer_with_a_token_that_holds_a_blank_is_told() -> None:
    core = tokenizer_of(None)
    core.add_tokens([AddedToken("the fox")])
    assert not part_at_blanks(json.loads(core.to_str()))


def test_a_tokenizer_that_does_otherwise_is_taken_as_it_is() -> None:
    core = tokenizer_of(r"\w+ \w+|\w+|[^\w]")
    core.train_from_iterator(["the fox"] * 9, None)
    given = ["the fox", "the fox jumps", "fox the"]
    by_words = Words(core)
    same(by_words.ids(given), core, given)
    assert by_words._by_words(given)[0].tolist() != by_words.ids(given)[0].tolist()
