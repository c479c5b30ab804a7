"""Pieces of an answer are its text, and come with whole characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_subspace.generation.answers import answers
from dist_subspace.generation.settings import generation_settings, greedy
from dist_subspace.generation.streaming import Pieces, streamed
from tests.tiny_models import tiny_model
from tests.tiny_run import make_tokenizer


def test_a_character_of_several_tokens_comes_as_a_whole_and_an_end_is_not_shown() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("añb 日\n c", add_special_tokens=False)["input_ids"]
    seen: list[str] = []
    pieces = Pieces(tokenizer, [5, 6], frozenset({1}), seen.append)
    pieces.put(torch.tensor([[5, 6]]))  # the prompt
    for token in [*ids, 1]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert seen == ["a", "ñ", "b", " ", "日", "\n", " ", "c"]


def test_what_never_becomes_a_character_is_shown_at_the_end() -> None:
    tokenizer = make_tokenizer()
    first = tokenizer("日", add_special_tokens=False)["input_ids"][0]
    seen: list[str] = []
    pieces = Pieces(tokenizer, [5, 6], frozenset(), seen.append)
    for token in ([5], [first]):
        pieces.put(torch.tensor(token))
    assert seen == []
    pieces.end()
    assert seen == ["\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("beams", [1, 2])
def test_the_pieces_are_the_answer_that_a_batch_gives(beams: int) -> None:
    model, tokenizer = tiny_model(vocab_size=258), make_tokenizer()
    config = generation_settings(model, given={"num_beams": beams, "max_new_tokens": 12})
    seen: list[str] = []
    answer = streamed(model, tokenizer, [70, 71], config, seen.append)
    (expected,) = answers(model, tokenizer, [[70, 71]], config)
    assert answer == expected and "".join(seen) == answer.text


def test_an_answer_ends_where_it_is_stopped() -> None:
    model, asked = tiny_model(), []

    def stopped() -> bool:
        asked.append(None)
        return len(asked) == 3

    answer: Any = streamed(
        model, make_tokenizer(), [3], greedy(model, max_new_tokens=9), lambda _: None, stopped=stopped
    )
    assert len(answer.ids) == 3
