"""Preferences in conversations: the tokens are those of the tokenizer's own chat template."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.preference_chat import OTHERWISE, chat_preference, chat_unpaired_preference
from dist_subspace.training.data.samples import Outcome, first_text
from dist_subspace.training.data.settings import DataSettings
from tests.training.data.chat_for_tests import chat_tokenizer

USER, SYSTEM = {"role": "user", "content": "why is it?"}, {"role": "system", "content": "Be brief."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("so it is.", "no idea at all"))


def outcome(tokenizer: Any, record: dict[str, Any], **settings: Any) -> Outcome:
    form = "chat-unpaired-preference" if "label" in record else "chat-preference"
    row = Row(record, 1, "x.jsonl", DataSettings(train="x.jsonl", format=form, **{"max_length": 10_000, **settings}))
    made = chat_unpaired_preference if "label" in record else chat_preference
    ((only,),) = made([row], Encoder(tokenizer))
    return only


def texts_of(found: Outcome) -> list[list[int]]:
    """The two texts of a pair."""
    assert found.sample is not None
    trained = [bool(flag) for flag in found.sample.trained]
    first = first_text(np.asarray(trained))
    return [list(found.sample.ids[:first]), list(found.sample.ids[first:])]


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen2", "qwen3", "gemma3", "marked"])
def test_each_text_is_what_the_template_makes_of_prompt_and_answer(template: str) -> None:
    """The answer begins where TRL lets it begin: where the prompt's rendering and the whole one part."""
    tokenizer = chat_tokenizer("byte-level", template)
    found = outcome(tokenizer, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    wholes = [tokenizer.apply_chat_template([USER, answer])["input_ids"] for answer in (GOOD, BAD)]
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    assert texts_of(found) == wholes
    shared = len(os.path.commonprefix([prompt, *wholes]))
    assert found.sample is not None
    assert [bool(t) for t in found.sample.trained] == [i >= shared for whole in wholes for i in range(len(whole))]
    assert (OTHERWISE in found.remarks) == (shared < len(prompt))


def test_prompts_are_found_however_they_are_written() -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    plain = outcome(tokenizer, {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]})
    whole = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    sharegpt = {
        "prompt": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "why is it?"}],
        "chosen": {"from": "gpt", "value": "so it is."},
        "rejected": {"from": "gpt", "value": "no idea at all"},
    }
    with_text = whole | {"prompt": "why is it?"}
    as_texts = {"prompt": [SYSTEM, USER], "chosen": "so it is.", "rejected": "no idea at all"}
    for record in (whole, sharegpt, with_text, as_texts):
        assert texts_of(outcome(tokenizer, record)) == texts_of(plain)


def test_a_long_prompt_loses_its_oldest_turns_and_then_its_left_part() -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    older = [{"role": "user", "content": "once " * 20}, {"role": "assistant", "content": "upon"}]
    record = {"prompt": [SYSTEM, *older, USER], "chosen": [GOOD], "rejected": [BAD]}
    short = texts_of(outcome(tokenizer, record | {"prompt": [SYSTEM, USER]}))
    limit = max(map(len, short)) + 5
    assert texts_of(outcome(tokenizer, record, max_length=limit)) == short
    tokens = texts_of(outcome(tokenizer, record, max_length=limit, truncation="tokens"))
    assert max(map(len, tokens)) == limit and tokens != short
    cut = texts_of(outcome(tokenizer, record, max_length=limit - 9))
    assert max(map(len, cut)) == limit - 9 and cut[0][-8:] == short[0][-8:]


def test_a_single_answer_has_its_label_and_tools_reach_the_template() -> None:
    tokenizer = chat_tokenizer("byte-level", "qwen2")
    tools = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}]
    found = outcome(tokenizer, {"prompt": [USER], "completion": [GOOD], "label": False, "tools": tools})
    assert found.sample is not None and found.sample.label == "false" and not found.sample.is_pair
    assert list(found.sample.ids) == tokenizer.apply_chat_template([USER, GOOD], tools=tools)["input_ids"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "an answer that begins with a message of 'user'"),
        ({"chosen": [GOOD, USER], "rejected": [BAD, USER]}, "do not begin with the same message"),
        ({"prompt": "else?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "is not what its answers begin with"),
        ({"prompt": [USER], "chosen": 3, "rejected": [BAD]}, "no list in column 'chosen'"),
    ],
)
def test_what_is_no_prompt_with_answers_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        outcome(chat_tokenizer("byte-level", "chatml"), record)
    assert message in str(caught.value)
