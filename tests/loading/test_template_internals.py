"""Chat templates in the quick sandbox: the renderings and the refusals of transformers' own."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError

from dist_subspace.loading.template_internals import quick_rendering
from tests.training.data.chat_for_tests import SPECIAL, chat_tokenizer

MEND = "see dist_subspace/loading/template_internals.py"
TALK = [{"role": ("user", "assistant")[n % 2], "content": f"the fox {n} <think>a</think> "} for n in range(6)]


def test_the_names_that_are_used_are_there() -> None:
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template("{{ messages[0].content | tojson }}")
    assert type(compiled.environment).__name__ == "ImmutableSandboxedEnvironment", MEND
    assert compiled.environment.filters["tojson"].__module__ == chat_template_utils.__name__, MEND


@pytest.mark.parametrize("name", SPECIAL)
def test_a_rendering_is_that_of_transformers(name: str) -> None:
    tokenizer = chat_tokenizer("byte-level", name)
    rendered = quick_rendering(tokenizer)
    assert rendered is not None
    assert rendered(TALK) == tokenizer.apply_chat_template(TALK, tokenize=False)


@pytest.mark.parametrize(
    "expression",
    [
        "messages[0].nothing is defined, messages[0].items() | list | length, messages[0].content.format",
        "messages[0].get('role'), messages[0].content.upper(), '{0.role}'.format(messages[0]), messages.count(1)",
        "messages[0].content.nothing, messages[0].content.title().split('F'), loop is defined, bos_token, eos_token",
        "namespace(a=1).a, dict(a=2).a, messages[0]['content'][2], messages[-1].role | upper, tools, documents",
        *("messages.append(1)", "messages[0].update({'a': 1})", "messages[0].pop('role')", "messages.clear()"),
        *(
            "''.__class__.__mro__",
            "messages[0].__class__",
            "messages.__init__.__globals__",
            "'{0.__class__}'.format(1)",
        ),
        *("raise_exception('no')", "messages[0].content.format.__self__", "namespace.mro()", "(1).__add__(2)"),
        *("messages[0].nothing.more", "cycler.__init__.__globals__", "messages[0]['__class__']"),
    ],
)
def test_what_a_template_may_do_is_what_it_may_do_there(expression: str) -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    tokenizer.chat_template = "{{ (" + expression + ") | string }}"
    rendered = quick_rendering(tokenizer)
    assert rendered is not None
    for _ in range(2):  # what is decided once is kept
        found, expected = outcome(rendered), outcome(lambda talk: tokenizer.apply_chat_template(talk, tokenize=False))
        assert found == expected
    assert TALK[0].keys() == {"role", "content"} and len(TALK) == 6


def outcome(render: Any) -> Any:
    try:
        return re.sub(r"0x[0-9a-f]+", "", render(TALK))
    except (SecurityError, TemplateError) as error:
        return type(error), str(error)


def test_a_tokenizer_that_renders_by_itself_has_no_quick_rendering() -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    tokenizer.apply_chat_template = lambda *_, **__: "mine"
    assert quick_rendering(tokenizer) is None

    class Own(type(chat_tokenizer("byte-level", "chatml"))):  # type: ignore[misc]
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "mine"

    other = chat_tokenizer("byte-level", "chatml")
    other.__class__ = Own
    assert quick_rendering(other) is None
