"""Ids of a text that is tokenised in parts are the ids of the text, with every tokenizer."""

from __future__ import annotations

import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_subspace.loading.tokenizer import load_tokenizer
from dist_subspace.training.data.masked import MaskedEncoder
from dist_subspace.training.data.parting import Parting
from tests.training.data.chat_for_tests import KINDS, chat_tokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen": QWEN,
    "across lines": r"\n?\w+|\s|[^\w\s]+",
    "by threes": r"\n\w{2,}|\w|\s|[^\w\s]+",
    "looks back": r"(?<=\n)\w|\w+|\s|.",
}
BITS = ["<|im_start|>", "<|im_end|>", "assistant\n", "\n\n", "  ", "<think>", "</think>", "<|im"]
BITS += ["the fox", "Über", "12", "'s", "é\u0301", "家"]


def split_tokenizer(expression: str) -> Any:
    """Byte-level with a rule of its own for where words part."""
    core = Tokenizer.from_str(chat_tokenizer("byte-level", "chatml").backend_tokenizer.to_str())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])
    core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False, lstrip=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_tokenizer("byte-level", "chatml").chat_template
    return tokenizer


def check(tokenizer: Any, seed: str) -> None:
    draw, encoder = random.Random(seed), MaskedEncoder(tokenizer)
    for _ in range(150):
        bits = draw.choices(BITS, k=draw.randint(1, 9))
        text = "".join(bits)
        places = sorted({sum(map(len, bits[:n])) for n in range(len(bits) + 1)})
        spans = [(a, b) for a, b in zip(places[::2], places[1::2]) if draw.random() < 0.6]
        ((ids, trained),) = encoder.tokens([(text, spans, places)])
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids.tolist() == found["input_ids"], text
        for place, (start, end) in enumerate(found["offset_mapping"]):
            if end > start:
                inside = any(start < b and end > a for a, b in spans)
                assert trained[place] == inside, (text, spans, place)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_give_the_ids_of_the_whole_and_the_mask_of_its_positions(kind: str) -> None:
    check(chat_tokenizer(kind, "chatml"), kind)


@pytest.mark.parametrize("name", SPLITS)
def test_a_content_is_parted_from_its_head_only_where_the_rules_part_them(name: str) -> None:
    check(split_tokenizer(SPLITS[name]), name)


def test_the_same_content_is_parted_from_different_heads() -> None:
    parting = Parting(split_tokenizer(QWEN))
    for head in ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"):
        assert len(head) in parting.edges(head + "the fox", [len(head)])
    for head in ("<|im_start|>assistant ", "<|im_start|>assistant"):
        assert len(head) not in parting.edges(head + "the fox", [len(head)])


def test_a_span_that_ends_within_a_token_has_it_without_positions_too(stories260k: Path) -> None:
    tokenizer, text = load_tokenizer(str(stories260k / "tokenizer.model")), "Once upon a time there was a little girl"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(pieces) == "▁" + text.replace(" ", "▁")  # so that the pieces say where they lie
    ends = [end - 1 for end in accumulate(map(len, pieces))]
    start, within = text.index("little"), 0
    for end in range(start + 1, len(text) + 1):
        ((ids, trained),) = MaskedEncoder(tokenizer).tokens([(text, [(start, end)], [])])
        last = next(n for n, reached in enumerate(ends) if reached >= end)
        assert len(ids) == len(pieces) and trained[last] and not trained[last + 1 :].any(), text[start:end]
        within += ends[last] > end
    assert within > 2
