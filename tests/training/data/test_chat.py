"""Conversations: which tokens of a rendered conversation are trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.chat import DEFAULT_CHAT_TEMPLATE
from tests.training.data.tokens_for_tests import char_tokenizer, prepared, texts

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "cu"},
]
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Shows the reasoning of the last turn only, as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def file_of(tmp_path: Path, messages: list[dict[str, str]] = TALK) -> str:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    return str(path)


def test_the_default_template_trains_every_assistant_turn_up_to_the_end_of_sequence(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    found = texts(prepared(tmp_path, tokenizer, train=file_of(tmp_path), format="chat"))
    start = "^<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo$\n"
    rest = "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\ncu$\n"
    assert found == [(start + rest, "yo$cu$")]
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE  # so that it is saved beside the adapter


def test_a_template_that_marks_nothing_is_read_by_what_each_turn_adds(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = PLAIN
    found = texts(prepared(tmp_path, tokenizer, train=file_of(tmp_path), format="chat"))
    assert found == [("[system]be kind\n[user]hi\n[assistant]yo$\n[user]bye\n[assistant]cu$\n", "yo$cu$")]


def test_a_template_that_renders_earlier_turns_differently_gives_a_sample_for_each_turn(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = FORGETFUL
    found = texts(prepared(tmp_path, tokenizer, train=file_of(tmp_path), format="chat"))
    assert [trained for _, trained in found] == ["<think>yo$", "<think>cu$"]
    assert found[1][0].count("<think>") == 1


def test_a_long_conversation_loses_what_stands_before_the_first_answer(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = PLAIN
    talk = TALK[:3]
    data = prepared(tmp_path, tokenizer, train=file_of(tmp_path, talk), format="chat", max_length=8)
    assert texts(data) == [("stant]yo$"[-8:], "yo$")]  # the line end after the answer goes before the prompt does


def test_a_template_that_refuses_is_one_sentence_naming_the_record(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match=r"chat\.jsonl: record 1.*roles must alternate"):
        prepared(tmp_path, tokenizer, train=file_of(tmp_path), format="chat")


def test_messages_that_are_no_list_of_role_and_content_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for messages in ("hello", [], [{"from": "human"}]):
        path.write_text(json.dumps({"messages": messages}))
        with pytest.raises(UsageError, match=r"a\.jsonl: record 1"):
            prepared(tmp_path, train=str(path), format="chat")
