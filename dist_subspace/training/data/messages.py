"""Conversations as the world writes them, cleaned to what a chat template is given.

A message comes as {role, content} or as ShareGPT's {from, value}. Nulls (Arrow gives every struct of a column every key
of the others) are dropped, as transformers does; JSON that stands in a string (tools, arguments) is decoded once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.values import half_of_a_pair

Message = dict[str, Any]
SHAREGPT = "conversations"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names of who speaks, and the role that chat templates know."""
SPEAKERS = {"user", "assistant", "system", "developer", "tool", "function", "ipython", "observation"}
"""Roles that one template or another knows."""
FLAGS = ("train", "training", "loss")
"""Names under which tools of the trade say whether a turn is trained."""
RESERVED = {
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "tokenize",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
}
"""Names that `apply_chat_template` takes itself: no record may set them."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given, and which of its messages are trained."""

    row: Row
    messages: list[Message]
    trained: list[bool]
    """One for each message: an assistant turn that is not masked."""
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template (`chat_template_kwargs`)."""

    def __str__(self) -> str:
        return str(self.row)

    def upto(self, end: int) -> Conversation:
        """The conversation's first `end` messages."""
        return replace(self, messages=self.messages[:end], trained=self.trained[:end])

    def without(self, start: int, end: int) -> Conversation:
        """The conversation without messages `start` to `end`."""
        return replace(
            self,
            messages=self.messages[:start] + self.messages[end:],
            trained=self.trained[:start] + self.trained[end:],
        )


def conversation(row: Row) -> Conversation:
    """The row's conversation.

    Raises:
        UsageError: for what is no list of messages, a content that is no text, tool calls that cannot be read.
    """
    try:
        return _conversation(row)
    except RecursionError as error:
        raise UsageError(f"{row} is nested too deeply; accepted: messages of text") from error


def _conversation(row: Row) -> Conversation:
    cleaned = [_message(row, message) for message in _listed_messages(row)]
    roles = {message["role"] for message, _ in cleaned}
    if "assistant" not in roles and (unknown := sorted(roles - SPEAKERS)):
        raise UsageError(
            f"{row} has a message of the role {unknown[0]!r} and none of 'assistant', whose turns are trained; accepted: role "
            "and content (user, assistant, system, tool), or ShareGPT's from and value"
        )
    return Conversation(
        row,
        [message for message, _ in cleaned],
        [is_trained and message["role"] == "assistant" for message, is_trained in cleaned],
        tools=_objects(row, "tools"),
        documents=_objects(row, "documents"),
        options=_options(row),
    )


def messages_in(row: Row, name: str, speaker: str) -> list[Message]:
    """The messages of a column that is no conversation of its own: a prompt, or an answer.

    Arguments:
        speaker: whose single message a text in the column is.

    Raises:
        UsageError: for what is no message.
    """
    value = row.value(name)
    if isinstance(value, str):
        return [{"role": speaker, "content": value}]
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed:
        column = row.settings.column(name)
        raise UsageError(f"{row} has no list in column {column!r}; accepted: [{{role, content}}], one of them, or text")
    return [_message(row, message)[0] for message in listed]


def conversation_of(row: Row, messages: list[Message]) -> Conversation:
    """These messages, of which none is trained, with the row's tools, documents and variables of the template."""
    tools, documents = _objects(row, "tools"), _objects(row, "documents")
    return Conversation(row, messages, [False] * len(messages), tools, documents, _options(row))


def _listed_messages(row: Row) -> list[Any]:
    column = row.settings.column("messages")
    by_name = row.settings.messages_field is None and row.record.get(column) is None
    if by_name and isinstance(row.record.get(SHAREGPT), list | str):
        column, messages = SHAREGPT, row.record[SHAREGPT]
    else:
        messages = row.value("messages")
    if isinstance(messages, str):
        messages = _decoded(row, messages, f"column {column!r}")
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{row} has no list in column {column!r}; accepted: [{{role, content}}] or [{{from, value}}]")
    return messages


def _message(row: Row, raw: Any) -> tuple[Message, bool]:
    """The message as templates take it, and whether it may be trained."""
    if not isinstance(raw, dict):
        raise UsageError(f"{row} has a message that is no object with role and content, but {type(raw).__name__}")
    message = _without_nulls(raw)
    if "role" not in message and "from" in message:
        message = _from_sharegpt(row, message)
    if not isinstance(message.get("role"), str):
        raise UsageError(f"{row} has a message that is no object with role and content (there: {', '.join(raw)})")
    is_trained = _weight(row, message)
    calls = _calls(row, message.pop("tool_calls", None))
    if calls:
        message["tool_calls"] = calls
    legacy = _calls(row, message.pop("function_call", None), "function_call")
    if legacy:
        message["function_call"] = legacy[0]
    if "content" in message:
        message["content"] = _text(row, message["content"])
    elif not calls and not legacy:
        raise UsageError(f"{row} has a message of {message['role']!r} with neither content nor tool_calls")
    return message, is_trained


def _from_sharegpt(row: Row, message: Message) -> Message:
    speaker = message["from"]
    if speaker not in ROLES:
        raise UsageError(f"{row} has a message from {speaker!r}; accepted: {', '.join(ROLES)}")
    named = {key: value for key, value in message.items() if key not in ("from", "value")} | {"role": ROLES[speaker]}
    if "value" not in message:
        return named
    if speaker != "function_call":
        return named | {"content": message["value"]}
    calls = message["value"]
    if isinstance(calls, str):
        calls = _decoded(row, calls, "a message from 'function_call'")
    calls = calls if isinstance(calls, list) else [calls]
    return named | {"tool_calls": [{"type": "function", "function": _call(row, call)} for call in calls]}


def _weight(row: Row, message: Message) -> bool:
    """Whether the message may be trained: neither `weight` nor a flag of FLAGS masks it. Both are taken out of the message."""
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise UsageError(f"{row} has a message with weight {weight!r}; accepted: 0 (not trained) or 1")
    flags = {name: message.pop(name) for name in FLAGS if name in message}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise UsageError(f"{row} has a message with {name} {flag!r}; accepted: true or false")
    return bool(weight) and all(flags.values())


def _text(row: Row, content: Any) -> str:
    """Text as it stands; a list of text parts is joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{row} has {type(content).__name__} as a message's content; accepted: text, or parts of text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UsageError(f"{row} has a part of type {kind!r} in a message's content; accepted: type 'text'")
        texts.append(part["text"])
    return "".join(texts)


def _calls(row: Row, calls: Any, name: str = "tool_calls") -> list[Any]:
    """The tool calls with their arguments as objects; `function_call`, its older name, is a single one."""
    if isinstance(calls, str):
        calls = _decoded(row, calls, name) if calls.strip() else None
    if not calls:
        return []
    if name == "function_call":
        calls = [calls]
    if not isinstance(calls, list):
        raise UsageError(f"{row} has {type(calls).__name__} as tool_calls; accepted: a list")
    return [_call(row, call) for call in calls]


def _call(row: Row, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"{row} has a tool call without a name; accepted: {{function: {{name, arguments}}}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = (
            _decoded(row, arguments, f"arguments of the tool call {function['name']!r}") if arguments.strip() else {}
        )
    if not isinstance(arguments, dict):
        raise UsageError(
            f"{row} has {type(arguments).__name__} as arguments of the tool call {function['name']!r}; accepted: an object"
        )
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def _objects(row: Row, name: str) -> list[Any] | None:
    """A list of objects that may stand in a string, or each in a string of its own; None where there are none."""
    column = row.settings.column(name)
    objects = row.record.get(column)
    if isinstance(objects, str):
        objects = _decoded(row, objects, f"column {column!r}") if objects.strip() else None
    if objects is None or objects == []:
        return None
    if not isinstance(objects, list):
        raise UsageError(f"{row} has {type(objects).__name__} in column {column!r}; accepted: a list of objects")
    entries = [
        _decoded(row, entry, f"column {column!r}") if isinstance(entry, str) else _without_nulls(entry)
        for entry in objects
    ]
    for entry in entries:
        if not isinstance(entry, dict):
            raise UsageError(f"{row} has {type(entry).__name__} within column {column!r}; accepted: objects")
    return entries


def _options(row: Row) -> dict[str, Any]:
    column = row.settings.column("chat_template_kwargs")
    options = row.record.get(column)
    if isinstance(options, str):
        options = _decoded(row, options, f"column {column!r}") if options.strip() else None
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UsageError(f"{row} has {type(options).__name__} in column {column!r}; accepted: an object")
    if reserved := sorted(RESERVED & set(options)):
        raise UsageError(f"{row} has {reserved[0]!r} in column {column!r}; accepted: variables of the chat template")
    return {key: value for key, value in options.items() if value is not None}


def _decoded(row: Row, text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text and (half := half_of_a_pair(json.dumps(value, ensure_ascii=False))):
            raise UsageError(
                f"{row} has half of a surrogate pair in {where}, {half}, which is no character; accepted: text that UTF-8 can "
                "hold"
            )
        return value
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{row} has text that is not JSON in {where}: {str(error).splitlines()[0]}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: part if type(part) is str else _without_nulls(part) for key, part in value.items() if part is not None
        }
    if isinstance(value, list | tuple):
        return [_without_nulls(part) for part in value]
    return value
