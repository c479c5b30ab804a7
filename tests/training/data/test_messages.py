"""Messages as the world writes them: what the chat template is given is what transformers would be given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.messages import Conversation, conversation
from dist_subspace.training.data.pieces import RECORDS
from dist_subspace.training.data.settings import DataSettings
from tests.training.data.chat_for_tests import chat_tokenizer, outcomes, parts
from tests.training.data.tokens_for_tests import prepared, texts

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It rains?",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Ulm", "days": 2}}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "wet"},
    {"role": "assistant", "content": "It rains."},
]


def read(settings: dict[str, Any] | None = None, **record: Any) -> Conversation:
    return conversation(
        Row(record, 7, "a.jsonl", DataSettings(**{"train": "a.jsonl", "format": "chat"} | (settings or {})))
    )


def as_string(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c | {"function": c["function"] | {"arguments": json.dumps(c["function"]["arguments"])}} for c in calls]


def with_nulls(talk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As Arrow gives a list of structs: every message has every key."""
    keys = {key for message in talk for key in message}
    return [{key: message.get(key) for key in sorted(keys)} for message in talk]


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "mistral_v3", "glm4_5"])
def test_tool_calls_render_as_transformers_renders_the_plain_messages(name: str) -> None:
    tokenizer = chat_tokenizer("byte-level", name)
    expected = tokenizer.apply_chat_template(TALK, tools=TOOLS, tokenize=False)
    assert "weather" in expected
    arguments = [[m | ({"tool_calls": as_string([CALL])} if "tool_calls" in m else {}) for m in TALK]]
    null = [m | ({"content": None} if "content" not in m else {}) for m in TALK]
    weighted = [m | {"weight": 1, "train": True} for m in TALK]
    listed = [
        m | ({"content": [{"type": "text", "text": c} for c in m["content"]]} if "content" in m else {}) for m in TALK
    ]
    for messages in (
        TALK,
        *arguments,
        null,
        with_nulls(TALK),
        with_nulls(arguments[0]),
        weighted,
        listed,
        json.dumps(TALK),
    ):
        for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
            found = read(messages=messages, tools=tools)
            assert tokenizer.apply_chat_template(found.messages, tools=found.tools, tokenize=False) == expected


def test_nulls_within_the_arguments_of_a_string_are_kept_and_those_of_arrow_are_not() -> None:
    inner = {"name": "f", "arguments": '{"a": null, "b": 1}'}
    assert read(messages=[{"role": "assistant", "tool_calls": [inner]}]).messages[0]["tool_calls"][0]["arguments"] == {
        "a": None,
        "b": 1,
    }
    inner = {"name": "f", "arguments": {"a": None, "b": 1}}  # type: ignore[dict-item]
    found = read(messages=[{"role": "assistant", "tool_calls": [inner], "content": None}])
    assert found.messages == [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"b": 1}}]}]


def test_a_null_among_the_variables_of_the_template_is_none_that_was_given() -> None:
    for given in ({"a": None, "b": 1}, '{"a": null, "b": 1}'):
        assert read(messages=TALK, chat_template_kwargs=given).options == {"b": 1}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "strings"])
def test_tools_documents_and_template_variables_reach_the_template_from_every_kind_of_file(
    tmp_path: Path, kind: str
) -> None:
    rows = [
        {"messages": TALK[:1] + TALK[3:], "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": TALK[:1] + TALK[3:], "tools": None, "chat_template_kwargs": None},
    ]
    if kind == "strings":
        rows = [{k: v if k == "messages" or v is None else json.dumps(v) for k, v in row.items()} for row in rows]
    if kind == "parquet":
        file = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file = tmp_path / "a.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = chat_tokenizer("byte-level", "qwen3")
    data = prepared(tmp_path, tokenizer, train=str(file), format="chat")
    for i, (tools, options) in enumerate([(TOOLS, {"enable_thinking": False}), (None, {})]):
        ids, labels = data.train.sample(i)
        expected = tokenizer.apply_chat_template(rows[i]["messages"], tools=tools, **options)["input_ids"]
        assert ids.tolist() == expected
        # With enable_thinking false the empty reasoning is the prompt's; without, the assistant's.
        trained = tokenizer.decode([t for t in labels.tolist() if t != -100])
        assert trained.startswith("It rains." if options else "<think>")


def test_columns_of_the_template_are_renamed_and_what_it_does_not_read_is_said(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"messages": TALK[:1] + TALK[3:], "functions": TOOLS, "docs": [{"title": "t", "text": "x"}]}] * 3
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = chat_tokenizer("byte-level", "qwen2")
    settings: dict[str, Any] = {
        "train": str(file),
        "format": "chat",
        "tools_field": "functions",
        "documents_field": "docs",
    }
    data = prepared(tmp_path, tokenizer, **settings)
    expected = tokenizer.apply_chat_template(rows[0]["messages"], tools=TOOLS)["input_ids"]
    assert data.train.sample(0)[0].tolist() == expected
    assert data.notices == ["3 conversations have documents, which the chat template does not read"]
    assert prepared(tmp_path, tokenizer, **settings).notices == data.notices  # from the cache alike
    plain = chat_tokenizer("byte-level", "chatml")
    assert any("have tools, which" in notice for notice in prepared(tmp_path, plain, **settings).notices)


def test_what_is_said_of_records_counts_those_of_every_piece_and_file(tmp_path: Path) -> None:
    row = json.dumps({"messages": TALK[:1] + TALK[3:], "documents": [{"title": "t", "text": "x"}]})
    for name, count in (("a", RECORDS + 2), ("b", 3)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([row] * count))
    files = [(str(tmp_path / f"{name}.jsonl"), 1.0) for name in "ab"]
    data = prepared(tmp_path, chat_tokenizer("byte-level", "qwen2"), train=files, format="chat")
    assert data.notices == [f"{RECORDS + 5} conversations have documents, which the chat template does not read"]


def test_a_template_of_its_own_for_tools_is_taken_for_rows_with_tools() -> None:
    from tests.training.data.chat_for_tests import outcomes

    tokenizer = chat_tokenizer("byte-level", "chatml")
    tokenizer.chat_template = {
        "default": tokenizer.chat_template,
        "tool_use": chat_tokenizer("byte-level", "qwen2").chat_template,
    }
    messages = TALK[:1] + TALK[3:]
    with_tools, without = outcomes(tokenizer, messages, tools=TOOLS)[0], outcomes(tokenizer, messages)[0]
    assert "weather" in parts(tokenizer, with_tools)[1] and "weather" not in parts(tokenizer, without)[1]
    assert parts(tokenizer, with_tools)[0] == parts(tokenizer, without)[0] == "It rains.<|im_end|>"


def test_a_masked_turn_is_shown_and_not_trained(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "yes", "weight": 1},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "never", "train": False},
    ]
    for name in ("chatml", "marked", "llama3", "mistral_v1"):
        tokenizer = chat_tokenizer("byte-level", name)
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({"messages": talk}))
        data = prepared(tmp_path, tokenizer, train=str(file), format="chat")
        ids, labels = data.train.sample(0)
        assert tokenizer.decode([t for t in labels.tolist() if t != -100]).strip().startswith("yes")
        assert "no" in tokenizer.decode(ids) and "never" in tokenizer.decode(ids)
        assert len(data.train) == 1 and "never" not in tokenizer.decode([t for t in labels.tolist() if t != -100])


def test_sharegpt_is_read_by_name(tmp_path: Path) -> None:
    talk = [{"from": "system", "value": "be"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"conversations": talk}))
    (found,) = texts(prepared(tmp_path, train=str(file), format="chat"))
    assert found[1] == "yo$" and "user\nhi" in found[0] and "system\nbe" in found[0]
    roles = [{"from": who, "value": "x"} for who in ("tool", "function", "observation", "assistant", "user")]
    assert [m["role"] for m in read(conversations=roles).messages] == ["tool", "tool", "tool", "assistant", "user"]
    assert read({"messages_field": "talk"}, talk=talk).messages[1] == {"role": "user", "content": "hi"}
    with pytest.raises(UsageError, match=r"'narrator'.*human"):
        read(conversations=[{"from": "narrator", "value": "x"}])


def test_function_calls_of_sharegpt_are_tool_calls() -> None:
    call = {"name": "weather", "arguments": {"city": "Ulm"}}
    for value in (json.dumps(call), json.dumps([call]), [call], call):
        talk = [{"from": "human", "value": "rain?"}, {"from": "function_call", "value": value}]
        found = read(
            conversations=[*talk, {"from": "observation", "value": "wet"}, {"from": "gpt", "value": "It rains."}]
        )
        assert found.messages[1] == {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
        assert found.messages[2] == {"role": "tool", "content": "wet"} and found.trained == [False, True, False, True]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": 5}, "int"),
        ({"role": "user", "content": True}, "bool"),
        ({"role": "user", "content": {"text": "x"}}, "dict"),
        ({"role": "user", "content": ["x"]}, "str"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "'image'"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "text"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "assistant"}, "tool_calls"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "0.5"),
        ({"role": "assistant", "content": "x", "train": "yes"}, "'yes'"),
        ({"role": "assistant", "tool_calls": "["}, "JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "'f'"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, "list"),
        ({"role": 1, "content": "x"}, "role"),
        ("x", "str"),
    ],
)
def test_a_message_that_is_no_text_is_refused_in_one_sentence(message: Any, named: str) -> None:
    with pytest.raises(UsageError, match=r"a\.jsonl: record 7.*") as caught:
        read(messages=[{"role": "user", "content": "x"}, message])
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": "{"},
        {"tools": 5},
        {"tools": [5]},
        {"chat_template_kwargs": "[]"},
        {"chat_template_kwargs": {"tools": []}},
    ],
)
def test_columns_of_the_template_that_cannot_be_read_are_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(columns))):
        read(messages=[{"role": "user", "content": "x"}], **columns)


def test_the_default_template_is_said_with_the_marks_that_are_not_in_the_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": TALK[:1] + TALK[3:]}))
    said = prepared(tmp_path, train=str(file), format="chat").notices
    assert len(said) == 1 and "ChatML" in said[0] and "<|im_end|> are not in its vocabulary" in said[0]
    own = chat_tokenizer("byte-level", "chatml")
    assert prepared(tmp_path, own, train=str(file), format="chat").notices == []


QUESTION, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
DEEP = '{"a": ' + "[" * 900 + "]" * 900 + "}"


HALF = '{"a": "\\ud800"}'
CALLED = ANSWER | {"function_call": {"name": "f", "arguments": HALF}}


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": [QUESTION, CALLED]}, "half of a surrogate pair in arguments of the tool call 'f'"),
        (
            {"messages": f'[{{"role": "user", "content": "x", "y": {HALF}}}]'},
            "half of a surrogate pair in column 'messages'",
        ),
        ({"messages": [QUESTION, ANSWER], "tools": f"[{HALF}]"}, "half of a surrogate pair in column 'tools'"),
        ({"messages": [QUESTION, ANSWER], "tools": f"[{DEEP}]"}, "nested too deeply"),
    ],
)
def test_json_within_a_string_is_held_to_what_json_in_the_file_is(record: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        read(**record)


def test_arguments_that_the_template_cannot_write_are_refused_and_not_written_otherwise() -> None:
    talk = [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}]
    with pytest.raises(UsageError, match="chat template refuses these messages"):
        outcomes(chat_tokenizer("byte-level", "qwen2"), talk)


@pytest.mark.parametrize("flag", ["train", "training", "loss"])
def test_a_flag_masks_a_turn_by_any_of_its_names(flag: str) -> None:
    assert read(messages=[QUESTION, ANSWER | {flag: False}, ANSWER | {flag: True}]).trained == [False, False, True]
    with pytest.raises(UsageError, match=f"message with {flag} 'no'; accepted: true or false"):
        read(messages=[QUESTION, ANSWER | {flag: "no"}])


@pytest.mark.parametrize("role", ["gpt", "Assistant", "model", "bot"])
def test_an_answer_under_another_role_is_refused_by_name(role: str) -> None:
    with pytest.raises(UsageError, match=f"role '{role}' and none of 'assistant'"):
        read(messages=[QUESTION, {"role": role, "content": "yo"}])
    assert read(messages=[QUESTION, ANSWER, {"role": "critic", "content": "good"}]).trained == [False, True, False]
    assert read(messages=[QUESTION]).trained == [False]


def test_a_system_prompt_beside_the_messages_is_said(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": [QUESTION, ANSWER], "system": text} for text in ("be kind", " ", None)]
    rows.append({"messages": [{"role": "system", "content": "be kind"}, QUESTION, ANSWER], "system": "be kind"})
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = prepared(tmp_path, chat_tokenizer("byte-level", "qwen2"), train=str(tmp_path / "a.jsonl"), format="chat")
    (said,) = data.notices
    assert said.startswith("1 records have a system prompt in the column 'system'")
