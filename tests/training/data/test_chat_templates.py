"""Real chat templates on tokenizers of every kind: exactly what the assistant says is trained, in the context of `generate`."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.loading.tokenizer import load_tokenizer
from tests.training.data.chat_for_tests import (
    KINDS,
    LOSSLESS,
    SPECIAL,
    Message,
    chat_tokenizer,
    outcomes,
    parts,
    template_text,
)

NO_SYSTEM = {"mistral_v1", "gemma2"}  # refuse one
MOVED = {"mistral_v3", "deepseek_r1"}  # show the assistant's prompt otherwise than it stands in the conversation
PER_TURN = {"qwen3", "harmony", "deepseek_r1"}  # render the last turn otherwise than earlier ones
CLOSING = {
    "llama3": "<|eot_id|>", "gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>", "phi3": "<|end|>", "glm4_5": "<|user|>",
    "deepseek_r1": "<｜end▁of▁sentence｜>", "command_r": "<|END_OF_TURN_TOKEN|>", "granite": "<|end_of_text|>",
    "harmony": "<|return|>",
} | dict.fromkeys(("chatml", "qwen2", "qwen3", "marked", "needs_question"), "<|im_end|>")  # fmt: skip


def talk(draw: random.Random, system: bool) -> list[Message]:
    """Messages that each have a word of their own, with blanks and line ends where people leave them."""
    roles = (["system"] if system else []) + ["user", "assistant"] * draw.randint(1, 3)
    blanks = ["", "", " ", "\n"]
    return [
        {"role": role, "content": f"{draw.choice(blanks)}the w{number}q fox  jumps.{draw.choice(blanks)}"}
        for number, role in enumerate(roles)
    ]


def words(text: str) -> set[str]:
    return set(re.findall(r"w\d+q", text.replace(" ", "")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECIAL)
def test_what_the_assistants_say_is_trained_and_nothing_else(name: str, kind: str) -> None:
    tokenizer = chat_tokenizer(kind, name)
    draw = random.Random(name + kind)
    for number in range(3):
        messages = talk(draw, system=bool(number % 2) and name not in NO_SYSTEM)
        said = [words(m["content"]) for m in messages if m["role"] == "assistant"]
        others = set().union(*(words(m["content"]) for m in messages if m["role"] != "assistant"))
        found = outcomes(tokenizer, messages)
        per_turn = len(found) > 1
        assert len(found) == (len(said) if per_turn else 1)
        for turn, outcome in enumerate(found):
            trained, rest = parts(tokenizer, outcome)
            expected = said[turn] if per_turn else set().union(*said)
            assert words(trained) == expected
            assert words(rest) <= others | set().union(*said[:turn]) and not words(rest) & expected
            assert outcome.sample is not None
            last = max(place for place, is_trained in enumerate(outcome.sample.trained) if is_trained)
            end = tokenizer.convert_ids_to_tokens(int(outcome.sample.ids[last]))
            assert end in ("</s>", CLOSING.get(name))  # the last target ends the turn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(SPECIAL) - MOVED))
def test_the_ids_are_those_of_transformers(name: str, kind: str) -> None:
    tokenizer = chat_tokenizer(kind, name)
    draw = random.Random(name)
    for number in range(2):
        messages = talk(draw, system=bool(number) and name not in NO_SYSTEM)
        turns = [place for place, m in enumerate(messages) if m["role"] == "assistant"]
        found = outcomes(tokenizer, messages)
        ends = turns if len(found) > 1 else [len(messages) - 1]
        for outcome, end in zip(found, ends, strict=True):
            expected = tokenizer.apply_chat_template(messages[: end + 1], tokenize=True)["input_ids"]
            assert outcome.sample is not None
            ids = [int(i) for i in outcome.sample.ids]
            if name in ("endless", "glm4_5"):  # templates that close nothing: the end of sequence follows the answer
                assert ids[-1] == tokenizer.eos_token_id
                ids, expected = ids[:-1], expected[: len(ids) - 1]
            assert ids == expected


@pytest.mark.parametrize("name", sorted(PER_TURN | {"mistral_v3"}))
def test_each_turn_is_seen_in_the_context_that_generate_shows(name: str) -> None:
    tokenizer = chat_tokenizer("byte-level", name)
    messages = talk(random.Random(4), system=True) + talk(random.Random(5), system=False)
    turns = [place for place, m in enumerate(messages) if m["role"] == "assistant"]
    for outcome, turn in zip(outcomes(tokenizer, messages), turns, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
        assert outcome.sample is not None
        assert [int(i) for i in outcome.sample.ids[: len(prompt)]] == prompt
        assert not any(outcome.sample.trained[: len(prompt)]) and all(outcome.sample.trained[len(prompt) : -1])


def test_the_system_turn_of_a_template_that_puts_it_into_the_last_question_is_not_lost() -> None:
    tokenizer = chat_tokenizer("byte-level", "mistral_v3")
    messages = [
        {"role": r, "content": c} for r, c in (("system", "Be kind"), ("user", "Hi there"), ("assistant", "Yo"))
    ]
    (outcome,) = outcomes(tokenizer, messages)
    assert parts(tokenizer, outcome) == (" Yo</s>", "<s>[INST] Be kind\n\nHi there[/INST]")


def test_a_reasoning_that_stands_in_earlier_turns_is_trained_there_and_shown_nowhere_else() -> None:
    tokenizer = chat_tokenizer("byte-level", "qwen3")
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first", "reasoning_content": "because"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "<think>\nhence\n</think>\n\nsecond"},
    ]
    found = [parts(tokenizer, outcome) for outcome in outcomes(tokenizer, messages)]
    assert [trained for trained, _ in found] == [
        "<think>\nbecause\n</think>\n\nfirst<|im_end|>",
        "<think>\nhence\n</think>\n\nsecond<|im_end|>",
    ]
    assert "because" not in found[1][1]


@pytest.mark.parametrize("name", ["needs_question", "chatml", "qwen3", "glm4_5", "phi3", "harmony", "llama3", "marked"])
@pytest.mark.parametrize("roles", ["au", "aua", "saua", "sa", "uuaa", "uaau"])
def test_conversations_whose_beginning_a_template_refuses_are_trained_where_the_whole_renders(
    name: str, roles: str
) -> None:
    tokenizer = chat_tokenizer("byte-level", name)
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[r], "content": f"the w{n}q fox"} for n, r in enumerate(roles)]
    if name == "needs_question" and "u" not in roles:
        return  # the whole does not render
    found = [parts(tokenizer, outcome)[0] for outcome in outcomes(tokenizer, messages)]
    assert set().union(*map(words, found)) == {f"w{n}q" for n, r in enumerate(roles) if r == "a"}


def test_a_tool_call_is_what_the_assistant_says_and_a_template_without_it_is_refused() -> None:
    call = {"type": "function", "function": {"name": "lookup", "arguments": '{"city": "Ulm"}'}}
    messages = [
        {"role": "user", "content": "rain"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "wet"},
        {"role": "assistant", "content": "It rains"},
    ]
    for name in ("qwen2", "qwen3", "mistral_v3", "glm4_5"):
        tokenizer = chat_tokenizer("byte-level", name)
        trained = "".join(parts(tokenizer, outcome)[0] for outcome in outcomes(tokenizer, messages))
        assert "lookup" in trained and "Ulm" in trained and "It rains" in trained and "wet" not in trained, name
    from dist_subspace.errors import UsageError

    for name in ("chatml", "granite", "zephyr", "marked"):
        with pytest.raises(UsageError, match="record 1: the chat template"):
            outcomes(chat_tokenizer("byte-level", name), [messages[0], messages[1] | {"content": ""}])


def test_marks_of_the_template_decide_and_the_closing_token_behind_them_is_trained() -> None:
    tokenizer = chat_tokenizer("unigram", "marked")  # drops blanks: transformers' own mask is lost there
    messages = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, [" a fox", " the dog ", "fox", "dog"])
    ]
    (outcome,) = outcomes(tokenizer, messages)
    trained, _ = parts(tokenizer, outcome)
    assert trained.replace(" ", "") == "thedog<|im_end|>dog<|im_end|>"


def test_marks_are_those_of_the_rendering_with_the_conversations_own_variables() -> None:
    tokenizer = chat_tokenizer("byte-level", "marked")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{{ 'kindly:\n' if kind else '' }}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "the dog"}]
    for kind in (True, False):
        (outcome,) = outcomes(tokenizer, messages, chat_template_kwargs={"kind": kind})
        trained, rest = parts(tokenizer, outcome)
        assert trained == "the dog<|im_end|>" and ("kindly" in rest) == kind


def test_a_template_and_a_tokenizer_that_close_nothing_are_said(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (outcome,) = outcomes(chat_tokenizer("byte-level", "endless", ends=False), messages)
    assert any("no end of an answer" in remark for remark in outcome.remarks)
    (outcome,) = outcomes(chat_tokenizer("byte-level", "endless"), messages)
    assert outcome.remarks == ()


def test_an_answer_that_the_template_shortens_is_said() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nso\n</think>\n\nb"}]
    (outcome,) = outcomes(chat_tokenizer("byte-level", "deepseek_r1"), messages)
    assert any("shortens" in remark for remark in outcome.remarks)


def test_a_sentencepiece_tokenizer_without_positions_is_masked_alike(stories260k: Path) -> None:
    tokenizer = load_tokenizer(str(stories260k / "tokenizer.model"))
    draw = random.Random(0)
    for name in ("llama2", "mistral_v1", "zephyr", "chatml", "endless", "qwen3"):
        tokenizer.chat_template = template_text(name)
        messages = talk(draw, system=False)
        said = set().union(*(words(m["content"]) for m in messages if m["role"] == "assistant"))
        trained = [words(parts(tokenizer, outcome)[0]) for outcome in outcomes(tokenizer, messages)]
        assert set().union(*trained) == said, name


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_mark_that_only_looks_like_a_special_token_stays_text(kind: str) -> None:
    tokenizer = chat_tokenizer(kind, "llama2")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the fox <s> twice"}]
    (outcome,) = outcomes(tokenizer, messages)
    expected = tokenizer.apply_chat_template(messages)["input_ids"]
    assert outcome.sample is not None and [int(i) for i in outcome.sample.ids] == expected


THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<|tool|>{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<|thought|>' }}{% endif %}"
)


def test_a_prompt_that_goes_on_with_an_empty_thought_is_followed_by_the_answer_alone() -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    tokenizer.chat_template = THOUGHT
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    for last, said in (
        ({"content": "w1q fine"}, "w1q fine"),
        ({"content": "<|thou w1q"}, "<|thou w1q"),
        ({"tool_calls": [call]}, '<|tool|>{"name": "weather", "arguments": {}}'),
    ):
        asked = [{"role": "user", "content": "ask w0q"}]
        (outcome,) = outcomes(tokenizer, [*asked, {"role": "assistant"} | last])
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert parts(tokenizer, outcome) == (said + "<|im_end|>", prompt + "\n")


def test_a_reasoning_that_the_template_does_not_read_is_said_and_one_that_it_reads_is_trained() -> None:
    for name, key in (("qwen2", "reasoning_content"), ("chatml", "thinking"), ("qwen3", "reasoning_content")):
        tokenizer = chat_tokenizer("byte-level", name)
        answer = {"role": "assistant", "content": "say w1q", key: "hm w2q"}
        (outcome,) = outcomes(tokenizer, [{"role": "user", "content": "ask w0q"}, answer])
        trained, _ = parts(tokenizer, outcome)
        said = any(remark.endswith("leaves out of the answer: it is not trained") for remark in outcome.remarks)
        assert ("w2q" in trained, said) == ((True, False) if name == "qwen3" else (False, True))


@pytest.mark.parametrize("arguments", [{"city": "Ulm"}, '{"city": "Ulm"}'])
@pytest.mark.parametrize("content", [None, ""])
def test_a_function_call_by_its_older_name_does_not_become_an_empty_answer(content: str | None, arguments: Any) -> None:
    call = {"name": "weather", "arguments": arguments}
    for written in (call, json.dumps(call)):
        answer = {"role": "assistant", "content": content, "function_call": written}
        with pytest.raises(UsageError, match="does not render the tool call 'weather'"):
            outcomes(chat_tokenizer("byte-level", "qwen2"), [{"role": "user", "content": "rain?"}, answer])


def test_an_empty_answer_amid_a_conversation_trains_what_closes_it_there() -> None:
    tokenizer = chat_tokenizer("byte-level", "chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}<unk>{{ m['content'] }}"
        "{{ '</s>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    talk = [
        {"role": r, "content": c}
        for r, c in (("user", "w0q"), ("assistant", ""), ("user", "w2q"), ("assistant", "w3q"))
    ]
    found = [parts(tokenizer, outcome)[0] for outcome in outcomes(tokenizer, talk)]
    assert found == ["assistant<unk></s>", "assistant<unk>w3q</s>"]
