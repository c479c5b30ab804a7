"""What is learned from a shape of conversations gives what each conversation gives by itself."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.messages import Conversation, conversation
from dist_subspace.training.data.recipes import Recipes
from dist_subspace.training.data.settings import DataSettings
from dist_subspace.training.data.template import ChatTemplate
from dist_subspace.training.data.turns import Passage, passages
from tests.training.data.chat_for_tests import SPECIAL, chat_tokenizer

SETTINGS = DataSettings(train="x.jsonl", format="chat")
PIECES = [
    "the fox",
    " jumps",
    "</think>",
    "<think>",
    "<tool_response>",
    "x\n\ny",
    "\n",
    "user",
    "<|im_end|>",
    "Ünï 家",
    "\ue000",
    "",
]


def alike(found: list[Passage]) -> list[Passage]:
    """Without the places of contents, which are known from a shape only."""
    return [replace(passage, contents=[]) for passage in found]


def talk(messages: list[dict[str, Any]]) -> Conversation:
    return conversation(Row({"messages": messages}, 1, "x", SETTINGS))


@pytest.mark.parametrize("name", SPECIAL)
def test_a_shape_gives_what_each_conversation_gives(name: str) -> None:
    template = ChatTemplate(chat_tokenizer("byte-level", name))
    recipes = Recipes(template)
    draw = random.Random(name)
    for number in range(120):
        roles = ["user", "assistant", "user", "assistant", "user"][: draw.randint(2, 5)]
        if draw.random() < 0.3:
            roles = ["system", *roles]
        pieces = PIECES[:2] if number % 2 else PIECES
        contents = [f"{n} " + " ".join(draw.choices(pieces, k=2)) for n in range(len(roles))]
        one = talk([{"role": role, "content": content} for role, content in zip(roles, contents)])
        try:
            expected = passages(one, template)
        except UsageError as error:
            with pytest.raises(UsageError) as caught:
                recipes.passages(one)
            assert str(caught.value) == str(error)
        else:
            assert alike(recipes.passages(one)) == alike(expected)


def test_a_conversation_of_a_known_shape_is_rendered_once() -> None:
    class Counting(ChatTemplate):
        renderings = 0

        def _rendered(self, one: Conversation, prompt: bool) -> str:
            Counting.renderings += 1
            return super()._rendered(one, prompt)

    recipes = Recipes(Counting(chat_tokenizer("byte-level", "qwen3")))
    # One of roles and contents only is rendered by the template as it is compiled, any other one by the tokenizer.
    for options, renderings in (({}, 0), ({"enable_thinking": True}, 9)):
        for number in range(10):
            messages = [{"role": r, "content": f"w{number} {n}"} for n, r in enumerate(["user", "assistant"] * 4)]
            recipes.passages(replace(talk(messages), options=options))
            if number == 0:
                Counting.renderings = 0
        assert Counting.renderings == renderings


def test_a_content_that_a_template_refuses_is_refused_within_a_known_shape() -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content|length > 9 %}{{ raise_exception('too long') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    recipes = Recipes(ChatTemplate(tokenizer))
    pair = ({"role": "user", "content": "why"}, {"role": "assistant", "content": "so"})
    assert len(recipes.passages(talk(list(pair)))) == 1
    with pytest.raises(UsageError, match="refuses these messages: too long"):
        recipes.passages(talk([pair[0], pair[1] | {"content": "because of it"}]))


def test_what_a_template_makes_of_the_contents_is_not_taken_from_another_conversation() -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    # Looks at how long a content is, which the shape does not say: the rendering of the whole shows it.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('short' if m.content|length < 3 else m.content) }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    recipes = Recipes(template)
    for contents in (("question", "answer"), ("why", "so"), ("a", "because")):
        one = talk([{"role": r, "content": c} for r, c in zip(("user", "assistant"), contents)])
        assert alike(recipes.passages(one)) == alike(passages(one, template))


def test_variables_of_the_template_are_part_of_the_shape() -> None:
    """Qwen 3 renders the whole conversation alike; with thinking off the empty thought is the prompt's, else the assistant's."""
    template = ChatTemplate(chat_tokenizer("byte-level", "qwen3"))
    recipes, found = Recipes(template), []
    for thinks in (True, False):
        one = talk([{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}])
        one = replace(one, options={"enable_thinking": thinks})
        found.append(alike(recipes.passages(one)))
        assert found[-1] == alike(passages(one, template))
    assert found[0][0].text == found[1][0].text and found[0][0].spans != found[1][0].spans
