"""Ids and masks of a filled pattern are those of its text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.masked import MaskedEncoder
from dist_subspace.training.data.messages import conversation
from dist_subspace.training.data.settings import DataSettings
from tests.training.data.chat_for_tests import KINDS, SPECIAL, chat_tokenizer

SETTINGS = DataSettings(train="x.jsonl", format="chat")
BITS = ["the fox", "jumps", "x\n\ny", "user", "Über", "家", "12", "don't", "(a)", "<a>"]
STARTS = [*["the fox", "jumps", "x\n\ny", "user", "12", "don't"] * 4, "Über", "(a)"]
ORDERS = [["user", "assistant"] * 2, ["user", "assistant"] * 4, ["user", "assistant", "user"], ["user", "assistant"]]


def compared(tokenizer: Any, seed: str) -> tuple[int, int]:
    """(passages that were filled, all passages) of conversations whose ids and masks were compared."""
    encoder, plain, draw = Encoder(tokenizer), MaskedEncoder(tokenizer), random.Random(seed)
    filled = every = 0
    for number in range(60):
        roles = ["system"] * (number % 3 == 0) + draw.choice(ORDERS)
        contents = [f"{draw.choice(STARTS)} {n} {draw.choice(BITS)}" for n in range(len(roles))]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        if number % 4 == 1:
            messages[1]["weight"] = number % 8 == 1
        try:
            found = encoder.recipes.passages(conversation(Row({"messages": messages}, 1, "x", SETTINGS)))
        except UsageError:  # a template that takes no system turn
            continue
        for passage in found:
            every += 1
            (tokens,) = encoder.patterns.tokens([passage.filling]) if passage.filling else [None]
            if tokens is not None:
                filled += 1
                ((ids, trained),) = plain.tokens([(passage.text, passage.spans, passage.contents)])
                assert tokens[0].tolist() == ids.tolist() == tokenizer.encode(passage.text, add_special_tokens=False)
                assert tokens[1].tolist() == trained.tolist(), passage
    return filled, every


@pytest.mark.parametrize("name", SPECIAL)
def test_a_filled_pattern_gives_what_its_text_gives(name: str) -> None:
    _, every = compared(chat_tokenizer("byte-level", name), name)
    assert every > 0


def test_most_conversations_of_a_common_template_are_filled_in() -> None:
    for name in ("qwen3", "chatml"):
        filled, every = compared(chat_tokenizer("byte-level", name), name)
        assert (
            filled > every / 3
        )  # contents that begin with a sign or beyond ASCII are tokenised with what is before them


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte-level"])
def test_a_tokenizer_that_reads_back_is_given_whole_texts(kind: str) -> None:
    assert compared(chat_tokenizer(kind, "chatml"), kind)[0] == 0
