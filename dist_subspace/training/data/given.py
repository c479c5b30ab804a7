"""The form in which a chat template takes messages.

Most take a content as text and the arguments of a tool call as an object. Some print arguments as they stand (those of
DeepSeek V3 and R1), some need a content beside a tool call, some read parts of contents only (those of vision-language models).
Whoever writes messages for such a template writes them so; here they are read once and given as the template takes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from dist_subspace.training.data.messages import Message

Form = tuple[bool, bool, bool]
"""(a missing content is "", arguments are JSON text, contents are lists of parts)."""
AS_READ: Form = (False, False, False)
FORMS: list[Form] = sorted(product((False, True), (False, True), (False, True)), key=sum)


def traits(messages: Sequence[Message]) -> tuple[bool, bool]:
    """(there are tool calls, a content is missing): on what the form depends, the template apart."""
    return any("tool_calls" in message for message in messages), any("content" not in message for message in messages)


def in_form(messages: list[Message], form: Form) -> list[Message]:
    """The messages in that form."""
    filled, as_text, in_parts = form
    if filled:
        messages = [{"content": ""} | message for message in messages]
    if as_text:
        messages = [
            message | {"tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in messages
        ]
    if in_parts:
        messages = [
            message | {"content": [{"type": "text", "text": message["content"]}]} if "content" in message else message
            for message in messages
        ]
    return messages


def fitting(messages: list[Message], rendered: Callable[[list[Message]], str | None]) -> Form | None:
    """The first form in which the template (`rendered`: None where it refuses) shows some content, and no object of Python's;
    None where it shows none in any."""
    return next((form for form in FORMS if _is_shown(messages, in_form(messages, form), rendered)), None)


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return call | {"function": function} if "function" in call else function


def _is_shown(messages: list[Message], formed: list[Message], rendered: Callable[[list[Message]], str | None]) -> bool:
    text = rendered(formed)
    if text is None:
        return False
    calls = [call.get("function", call)["arguments"] for message in formed for call in message.get("tool_calls", [])]
    for arguments in filter(None, calls):
        # {'city': 'Ulm'} is no JSON, and \\"city\\" is JSON within JSON.
        if (str(arguments) in text) != isinstance(arguments, str):
            return False
    contents = [message["content"].strip() for message in messages if message.get("content", "").strip()]
    squeezed = "".join(text.split())
    return not contents or any(content in text or "".join(content.split()) in squeezed for content in contents)
