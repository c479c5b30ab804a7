"""The keys of `data` that say which columns a record has, and how they become text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.keys.begun import Row, begin, rows_of
from tests.keys.bench import Bench
from tests.keys.data_reference import (
    all_trained,
    answered,
    assert_same,
    classifying,
    conversed,
    tokenizer_of,
    usual,
)
from tests.keys.reference import padded

WORDS = ("one", "three", "", "a longer one", "é\n2")
TALK = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
TALKS = [
    [*TALK, {"role": "user", "content": word}, {"role": "assistant", "content": word * 2}] for word in WORDS if word
]


def alpaca_prompt(instruction: str, given: str) -> str:
    """The documented text; without an input no block for one."""
    block = f"### Input:\n{given}\n\n" if given.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n"


def format_(bench: Bench) -> None:
    """Each of them; a run's loss is transformers' own on the same rows, wherever micro-batches part them."""
    tokenizer = tokenizer_of(bench)
    alpaca = [{"instruction": f"say {w}", "input": w, "output": w[:3]} for w in WORDS]
    alpaca.append({"instruction": "blank", "input": "  ", "output": "b"})
    expected = [answered(tokenizer, alpaca_prompt(r["instruction"], r["input"]), r["output"]) for r in alpaca]
    assert_same(begin(bench, usual(bench, alpaca, "alpaca")).rows, expected, "alpaca")
    texts = [{"text": f"{word}."} for word in WORDS]
    expected = [all_trained(tokenizer, record["text"]) for record in texts]
    assert_same(begin(bench, usual(bench, texts, "text")).rows, expected, "text")
    talks = [{"messages": talk} for talk in TALKS]
    expected = [conversed(tokenizer, talk) for talk in TALKS]
    assert_same(begin(bench, usual(bench, talks, "chat")).rows, expected, "chat")
    labelled = [{"text": f"{word} so", "label": "ab"[len(word) % 2]} for word in WORDS]
    rows = [(tokenizer(r["text"]).input_ids, ["ab".index(r["label"])]) for r in labelled]
    begun = begin(bench, classifying(bench, labelled))
    assert_same(begun.rows, rows, "classification")
    _completion(bench)
    _preferences(bench)


def _completion(bench: Bench) -> None:
    tokenizer = tokenizer_of(bench)
    records = [{"prompt": f"{word} is", "completion": f" {word}" * (1 + n)} for n, word in enumerate(WORDS)]
    expected = [answered(tokenizer, r["prompt"], r["completion"]) for r in records]
    changes = {"training.global_batch_size": 4, "training.per_device_train_batch_size": 2, "training.max_steps": 1}
    given = usual(bench, records, "completion") | changes
    begun = begin(bench, given)
    rows = [row for micro in begun.micro_batches for row in rows_of(micro)]
    outcome = bench.run(given)
    assert outcome.trained_on == [ids for ids, _ in rows], "the run takes other rows than its plan"
    assert all(row in expected for row in rows), "prompt and completion"
    inputs = padded([ids for ids, _ in rows])
    inputs["labels"] = padded([labels for _, labels in rows])["labels"].where(inputs["attention_mask"] == 1, -100)
    loss = float(bench.peft_model().eval()(**inputs).loss.detach())
    assert abs(outcome.steps[0]["loss"] - loss) < 2e-5 * loss, "the mean over all targets of the step"
    assert outcome.steps[0]["tokens"] == sum(len(ids) for ids, _ in rows)
    assert outcome.steps[0]["samples"] == len(rows)


_PREFERRED = [{"prompt": f"{word} is", "chosen": f" {word}!", "rejected": " no" * n} for n, word in enumerate(WORDS)]


def _preferences(bench: Bench) -> None:
    """A pair is two rows; a single answer is one, and in a conversation both are as the template renders them."""
    pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
    tokenizer = tokenizer_of(bench)
    assert_same(begin(bench, _pairs(bench, _PREFERRED)).rows, _both(tokenizer, _PREFERRED), "preference")
    singles = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in _PREFERRED]
    expected = [answered(tokenizer, r["prompt"], r["completion"]) for r in singles]
    given = usual(bench, singles, "unpaired-preference", training__objective="kto")
    assert_same(begin(bench, given).rows, expected, "unpaired-preference")


def _pairs(bench: Bench, records: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return usual(bench, records, "preference", training__objective="dpo", **changes)


def _both(tokenizer: Any, records: list[dict[str, Any]]) -> list[Row]:
    return [answered(tokenizer, r["prompt"], r[name]) for r in records for name in ("chosen", "rejected")]


def preferred(key: str) -> Callable[[Bench], None]:
    """As `renamed`, of a pair."""

    def check(bench: Bench) -> None:
        pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
        records = [record | {"other": f"{n} real"} for n, record in enumerate(_PREFERRED)]
        expected = _both(tokenizer_of(bench), [record | {key: record["other"]} for record in records])
        begun = begin(bench, _pairs(bench, records, **{f"data__{key}_field": "other"}))
        assert_same(begun.rows, expected, f"data.{key}_field")

    return check


def template(bench: Bench) -> None:
    """{columns} are filled in, braces that are doubled stand for themselves; a renamed column goes before one of its name."""
    tokenizer = tokenizer_of(bench)
    records = [{"instruction": word, "input": "in", "output": "out", "place": f"p{n}"} for n, word in enumerate(WORDS)]
    text = "Q {{{instruction}}} {place} {input}\nA "
    expected = [answered(tokenizer, f"Q {{{r['instruction']}}} {r['place']} in\nA ", "out") for r in records]
    assert_same(begin(bench, usual(bench, records, "alpaca", data__template=text)).rows, expected, "template")
    given = {"data__template": text, "data__instruction_field": "place"}
    expected = [answered(tokenizer, f"Q {{{r['place']}}} {r['place']} in\nA ", "out") for r in records]
    assert_same(begin(bench, usual(bench, records, "alpaca", **given)).rows, expected, "a renamed column")


def renamed(key: str) -> Callable[[Bench], None]:
    """The column of another name is read, and the one with the format's own name is not."""

    def check(bench: Bench) -> None:
        form, decoys, row = _FORMATS[key]
        tokenizer = tokenizer_of(bench)
        records = [decoys | {"other": f"{word} real"} for word in WORDS]
        given = usual(bench, records, form, **{f"data__{key}_field": "other"})
        expected = [row(tokenizer, decoys | {key: record["other"]}) for record in records]
        assert_same(begin(bench, given).rows, expected, f"data.{key}_field")

    return check


def _alpaca(tokenizer: Any, record: dict[str, Any]) -> Row:
    return answered(tokenizer, alpaca_prompt(record["instruction"], record["input"]), record["output"])


def _pair(tokenizer: Any, record: dict[str, Any]) -> Row:
    return answered(tokenizer, record["prompt"], record["completion"])


_FORMATS: dict[str, tuple[str, dict[str, Any], Callable[[Any, dict[str, Any]], Row]]] = {
    "text": ("text", {"text": "decoy"}, lambda tokenizer, record: all_trained(tokenizer, record["text"])),
    "prompt": ("completion", {"prompt": "decoy", "completion": "c"}, _pair),
    "completion": ("completion", {"prompt": "p", "completion": "decoy"}, _pair),
    "instruction": ("alpaca", {"instruction": "decoy", "input": "i", "output": "o"}, _alpaca),
    "input": ("alpaca", {"instruction": "n", "input": "decoy", "output": "o"}, _alpaca),
    "output": ("alpaca", {"instruction": "n", "input": "i", "output": "decoy"}, _alpaca),
}


def messages_field(bench: Bench) -> None:
    decoy = [{"role": "user", "content": "decoy"}, {"role": "assistant", "content": "decoy"}]
    records = [{"messages": decoy, "other": talk} for talk in TALKS]
    expected = [conversed(tokenizer_of(bench), talk) for talk in TALKS]
    begun = begin(bench, usual(bench, records, "chat", data__messages_field="other"))
    assert_same(begun.rows, expected, "data.messages_field")


def label_field(bench: Bench) -> None:
    """Names are numbered in their alphabetical order, and the model is told them."""
    tokenizer, kinds = tokenizer_of(bench), ("warm", "cold", "hot")
    records = [{"text": f"{word} so", "label": "decoy", "other": kinds[n % 3]} for n, word in enumerate(WORDS)]
    begun = begin(bench, classifying(bench, records, data__label_field="other"))
    order = sorted(kinds)
    expected = [(tokenizer(r["text"]).input_ids, [order.index(r["other"])]) for r in records]
    assert_same(begun.rows, expected, "data.label_field")
    assert begun.model.config.id2label == dict(enumerate(order))


def for_the_template(key: str, value: Any, given: dict[str, Any]) -> Callable[[Bench], None]:
    """What the column holds reaches the template, as `apply_chat_template` is given it."""

    def check(bench: Bench) -> None:
        records = [{"messages": talk, "other": value} for talk in TALKS]
        expected = [conversed(tokenizer_of(bench), talk, **given) for talk in TALKS]
        plain = [conversed(tokenizer_of(bench), talk) for talk in TALKS]
        assert expected != plain
        begun = begin(bench, usual(bench, records, "chat", **{f"data__{key}_field": "other"}))
        assert_same(begun.rows, expected, f"data.{key}_field")

    return check


_TOOLS = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}]
_DOCUMENTS = [{"title": "t", "text": "first"}, {"title": "u", "text": "second"}]
tools_field = for_the_template("tools", _TOOLS, {"tools": _TOOLS})
documents_field = for_the_template("documents", _DOCUMENTS, {"documents": _DOCUMENTS})
chat_template_kwargs_field = for_the_template("chat_template_kwargs", {"mood": "gay "}, {"mood": "gay "})
