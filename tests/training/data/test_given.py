"""A template gets messages in the form in which it takes them: what it renders then is what transformers renders."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.training.data.chat_for_tests import chat_tokenizer, outcomes, parts

ARGUMENTS = {"city": "Ulm w2q", "days": 2}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "ask w1q"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "wet w3q"},
    {"role": "assistant", "content": "say w4q"},
]
TURN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\nBODY<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = "{% for c in m['tool_calls'] or [] %}{{ '[' + c['function']['name'] + ' ' + ARGUMENTS + ']' }}{% endfor %}"
TEXT = CALLS.replace("ARGUMENTS", "c['function']['arguments']")
OBJECT = CALLS.replace("ARGUMENTS", "c['function']['arguments'] | tojson")
PRINTED = "{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}"
BODIES = {
    "adds the arguments to a text": "{{ m.get('content', '') }}" + TEXT,
    "prints the arguments": "{{ m.content }}" + PRINTED,
    "needs a content": "{{ '' + m['content'] }}" + OBJECT,
    "needs a content and a text": "{{ '' + m['content'] }}" + TEXT,
    "reads parts": "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}" + OBJECT,
    "takes them as they are": "{{ m.content }}" + OBJECT,
}
TEMPLATES = {name: TURN.replace("BODY", body) for name, body in BODIES.items()}


def written_for(name: str) -> list[dict[str, Any]]:
    """The conversation as someone must write it who gives it to the template by transformers."""
    called = dict(TALK[1])
    if "text" in name or "prints" in name:
        called["tool_calls"] = [
            {"type": "function", "function": CALL["function"] | {"arguments": json.dumps(ARGUMENTS)}}
        ]  # type: ignore[operator]
    if "content" in name:
        called["content"] = ""
    talk = [TALK[0], called, *TALK[2:]]
    if "parts" in name:
        return [m | ({"content": [{"type": "text", "text": m["content"]}]} if "content" in m else {}) for m in talk]
    return talk


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_gets_the_messages_in_its_own_form(name: str) -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    tokenizer.chat_template = TEMPLATES[name]
    expected = tokenizer.apply_chat_template(written_for(name), return_dict=False)
    for talk in (TALK, written_for(name)):
        (outcome,) = outcomes(tokenizer, talk)
        assert outcome.sample is not None and list(map(int, outcome.sample.ids)) == expected
        trained, shown = parts(tokenizer, outcome)
        assert f"[weather {json.dumps(ARGUMENTS)}]<|im_end|>" in trained and "say w4q<|im_end|>" in trained
        assert "w3q" in shown and "w1q" in shown and "w3q" not in trained


def test_a_template_of_parts_gets_parts_without_tool_calls_too() -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    tokenizer.chat_template = TEMPLATES["reads parts"]
    (outcome,) = outcomes(tokenizer, [TALK[0], TALK[3]])
    assert parts(tokenizer, outcome)[0] == "say w4q<|im_end|>" and outcome.remarks == ()
