"""A prompt is what the model saw before its answer in training, and an answer ends at what ended it there."""

from __future__ import annotations

from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.formats import FORMATS
from dist_subspace.training.data.prompting import Prompting
from dist_subspace.training.data.settings import DataSettings
from tests.tiny_run import make_tokenizer
from tests.training.data.chat_for_tests import SPECIAL, chat_tokenizer, outcomes

CHATML = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}
RECORDS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "completion": {"prompt": "Once upon", "completion": " a time"},
    "chat": {"messages": [{"role": "system", "content": "Be kind."}, ASK, ANSWER]},
}


def prompting(form: str, tokenizer: Any = None, **settings: Any) -> Prompting:
    return Prompting(DataSettings(train="", format=form, **settings), tokenizer or make_tokenizer())


def chatml_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("form", list(RECORDS))
def test_the_prompt_is_what_stands_before_the_trained_tokens(form: str) -> None:
    tokenizer = chatml_tokenizer() if form == "chat" else make_tokenizer()
    settings = DataSettings(train="", format=form)
    ((outcome,),) = FORMATS[form]([Row(RECORDS[form], 1, "x", settings)], Encoder(tokenizer))
    assert outcome.sample is not None
    first = list(outcome.sample.trained).index(True)
    (prompt,) = Prompting(settings, tokenizer).of_records([RECORDS[form]])
    assert prompt.ids == list(outcome.sample.ids[:first])
    answer = tokenizer.decode(list(outcome.sample.ids[first:]), skip_special_tokens=True)
    assert prompt.answer is not None and answer.strip() == prompt.answer.strip()
    assert outcome.sample.ids[-1] in Prompting(settings, tokenizer).stops() or form == "chat"


def test_texts_are_written_out() -> None:
    alpaca = prompting("alpaca")
    (prompt,) = alpaca.of_records([alpaca.record("Add.", input="1 2")])
    assert prompt.text == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n" and prompt.answer is None
    own = prompting("alpaca", template="Q: {instruction}\nA:", instruction_field="ask")
    (prompt,) = own.of_records([own.record("Why?")])
    assert prompt.text == "Q: Why?\nA:" and own.record("Why?") == {"ask": "Why?"}
    for form in ("completion", "text"):
        (prompt,) = prompting(form).of_records([prompting(form).record("Once upon")])
        assert prompt.ids == [0, *make_tokenizer()("Once upon", add_special_tokens=False)["input_ids"]] or prompt.text


def test_a_chat_is_rendered_by_the_template_with_its_system_turn_tools_and_history() -> None:
    tokenizer, tools = chatml_tokenizer(), [{"type": "function", "function": {"name": "add"}}]
    chat = prompting("chat", tokenizer)
    record = chat.record("And now?", system="Be kind.", history=[ASK, ANSWER], tools=tools)
    (prompt,) = chat.of_records([record])
    messages = [{"role": "system", "content": "Be kind."}, ASK, ANSWER, {"role": "user", "content": "And now?"}]
    assert prompt.ids == list(
        tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    )
    assert chat.stops() == [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_without_a_template_of_its_own_a_chat_ends_at_the_end_of_sequence() -> None:
    assert prompting("chat").stops() == [1] and prompting("alpaca").stops() == [1]


@pytest.mark.parametrize(
    ("form", "record", "said"),
    [
        ("alpaca", {"text": "x"}, r"the input: record 1 has no column 'instruction'"),
        ("chat", {"messages": [ANSWER]}, r"turns of the assistant alone"),
        ("completion", {"prompt": ""}, r"record 1 has an empty prompt"),
    ],
)
def test_a_record_that_asks_nothing_is_refused(form: str, record: dict[str, Any], said: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(UsageError, match=said):
        prompting(form, tokenizer).of_records([record])


def test_a_format_without_written_answers_and_a_system_turn_without_a_chat_are_refused() -> None:
    with pytest.raises(UsageError, match="in which no answer is written; accepted: alpaca, chat"):
        prompting("classification")
    with pytest.raises(UsageError, match="system is given, but format 'alpaca' has none"):
        prompting("alpaca").record("x", system="Be kind.")


TWO_TURNS = [
    {"role": "user", "content": "the w0q fox"},
    {"role": "assistant", "content": "the w1q dog"},
    {"role": "user", "content": "the w2q fox"},
    {"role": "assistant", "content": "the w3q dog"},
]


@pytest.mark.parametrize("name", SPECIAL)
def test_in_every_family_of_templates_the_prompt_is_trained_before_its_answer_and_the_answer_ends_at_a_stop(
    name: str,
) -> None:
    tokenizer = chat_tokenizer("byte-level", name)
    chat = prompting("chat", tokenizer)
    (prompt,) = chat.of_records([{"messages": TWO_TURNS}])
    *_, last = outcomes(tokenizer, TWO_TURNS)
    assert last.sample is not None and prompt.answer == "the w3q dog"
    ids, trained = [int(i) for i in last.sample.ids], [bool(flag) for flag in last.sample.trained]
    # A prompt that ends with a blank ends within a token of the whole, and is what `apply_chat_template` gives all the same.
    length = len(prompt.ids) - (name == "endless")
    assert ids[:length] == prompt.ids[:length] and trained[length] and not trained[length - 1]
    for outcome in outcomes(tokenizer, TWO_TURNS):
        assert outcome.sample is not None
        flags = [*map(bool, outcome.sample.trained), False]
        ends = [int(outcome.sample.ids[i]) for i in range(len(flags) - 1) if flags[i] and not flags[i + 1]]
        closed = ends[-1:] if name == "endless" else ends  # whose earlier turns have no end
        assert set(closed) <= set(chat.stops()), tokenizer.convert_ids_to_tokens([*ends, *chat.stops()])
