"""What a sample that is too long loses, what it keeps, and that it is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_subspace.training.data.cutting import Cutting
from tests.training.data.chat_for_tests import chat_tokenizer
from tests.training.data.tokens_for_tests import char_tokenizer, prepared, texts

LONG = "abcdefghijklmnopqrstuvwxyz" * 4
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def write(path: Path, records: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def chat(
    tmp_path: Path, talk: list[tuple[str, str]], limit: int, template: str = PLAIN, **settings: Any
) -> list[tuple[str, str]]:
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    file = write(tmp_path / "a.jsonl", [{"messages": [{"role": names[r], "content": c} for r, c in talk]}])
    return texts(prepared(tmp_path, tokenizer, train=file, format="chat", max_length=limit, **settings))


TALK = [("s", "be"), ("u", "one"), ("a", "1"), ("u", "two"), ("a", "2"), ("u", "three"), ("a", "3")]


def test_whole_oldest_turns_go_and_the_marks_and_the_system_turn_stay(tmp_path: Path) -> None:
    whole = "^[s]be[u]one[a]1$[u]two[a]2$[u]three[a]3$"
    assert chat(tmp_path, TALK, len(whole)) == [(whole, "1$2$3$")]
    for limit in (len(whole) - 1, len(whole) - len("[u]one[a]1$")):
        assert chat(tmp_path, TALK, limit) == [("^[s]be[u]two[a]2$[u]three[a]3$", "2$3$")]
    assert chat(tmp_path, TALK, 28) == [("^[s]be[u]three[a]3$", "3$")]


def test_a_developers_turn_stays_as_the_systems_does(tmp_path: Path) -> None:
    talk = [("d", "be"), *TALK[1:]]
    assert chat(tmp_path, talk, 28) == [("^[d]be[u]three[a]3$", "3$")]
    assert chat(tmp_path, talk, 17) == [("^[d]be[u]ree[a]3$", "3$")]


def test_the_one_turn_that_is_still_too_long_is_cut_from_the_left_behind_the_marks(tmp_path: Path) -> None:
    assert chat(tmp_path, TALK, 17) == [("^[s]be[u]ree[a]3$", "3$")]
    # Where the system turn leaves no room for an answer, it goes as well, and the mark stays.
    assert chat(tmp_path, [("s", LONG), ("u", "hi"), ("a", "yo")], 10) == [("^]hi[a]yo$", "yo$")]
    assert chat(tmp_path, [("u", LONG), ("a", "yo")], 12) == [("^[u]yz[a]yo$", "yo$")]


def test_tokens_from_the_left_where_that_is_asked_for(tmp_path: Path) -> None:
    whole = "^[s]be[u]one[a]1$[u]two[a]2$[u]three[a]3$"
    first = whole.index("1$")
    assert chat(tmp_path, TALK, len(whole) - 4, truncation="tokens") == [("^" + whole[5:], "1$2$3$")]
    left = len(whole) - first + 1
    assert chat(tmp_path, TALK, left, truncation="tokens") == [("^" + whole[first:], "1$2$3$")]


def test_a_system_turn_that_stands_in_the_last_question_is_kept_with_it(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("byte-level", "mistral_v3")
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": "yo"},
    ]
    whole = tokenizer.apply_chat_template(messages[:2])["input_ids"]
    file = write(tmp_path / "a.jsonl", [{"messages": messages}])
    data = prepared(tmp_path, tokenizer, train=file, format="chat", max_length=len(whole) - 20)
    ids, labels = data.train.sample(0)
    assert tokenizer.decode(ids).startswith("<s>[INST] be kind\n\n") and tokenizer.decode(ids).endswith(
        "xyz[/INST] yo</s>"
    )
    assert tokenizer.decode([t for t in labels.tolist() if t != -100]) == " yo</s>"


def test_turns_of_a_template_that_forgets_are_cut_one_by_one(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("byte-level", "qwen3")
    messages = [
        {"role": r, "content": c}
        for r, c in zip(["user", "assistant"] * 3, ["q1 " + LONG, "a1", "q2", "a2", "q3", "a3"])
    ]
    file = write(tmp_path / "a.jsonl", [{"messages": messages}])
    limit = len(tokenizer.apply_chat_template(messages[2:])["input_ids"])
    data = prepared(tmp_path, tokenizer, train=file, format="chat", max_length=limit)
    found = [data.train.sample(i)[0].tolist() for i in range(len(data.train))]
    assert found[1] == tokenizer.apply_chat_template(messages[2:4])["input_ids"]
    assert found[2] == tokenizer.apply_chat_template(messages[2:])["input_ids"]
    assert tokenizer.decode(found[0]).startswith("<|im_start|>user\n") and len(found[0]) <= limit
    assert data.cutting.cut == 3 and data.cutting.samples == 3


@pytest.mark.parametrize("truncation", ["turns", "tokens"])
def test_prompts_of_every_format_keep_what_the_tokenizer_puts_before_them(tmp_path: Path, truncation: str) -> None:
    rows = [{"instruction": LONG, "prompt": LONG, "output": "xyz", "completion": "xyz"}]
    file = write(tmp_path / "a.jsonl", rows)
    for name in ("alpaca", "completion"):
        ((text, trained),) = texts(prepared(tmp_path, train=file, format=name, max_length=20, truncation=truncation))
        assert len(text) == 20 and text.startswith("^") and text.endswith("xyz$") and trained == "xyz$"


def test_a_text_that_begins_with_the_rendered_mark_has_it_once(tmp_path: Path) -> None:
    rows = [
        {"text": "<s>hi", "prompt": "<s>hi", "completion": "yo"},
        {"text": "hi</s>", "prompt": "hi", "completion": "yo</s>"},
    ]
    rows = [row | {"instruction": row["prompt"], "output": row["completion"]} for row in rows]
    file = write(tmp_path / "a.jsonl", rows)
    assert [text for text, _ in texts(prepared(tmp_path, train=file, format="text"))] == ["^hi$", "^hi$"]
    assert texts(prepared(tmp_path, train=file, format="completion")) == [("^hiyo$", "yo$")] * 2
    found = texts(prepared(tmp_path, train=file, format="alpaca", template="{instruction}:"))
    assert found == [("^hi:yo$", "yo$")] * 2


def test_every_token_of_a_text_is_in_a_piece_and_an_empty_text_is_left_out(tmp_path: Path) -> None:
    for length in range(1, 12):
        for limit in range(2, 6):
            file = write(tmp_path / f"{length}-{limit}.jsonl", [{"text": LONG[:length]}, {"text": ""}])
            data = prepared(tmp_path, train=file, format="text", max_length=limit)
            found = [text for text, _ in texts(data)]
            assert all(1 < len(text) <= limit for text in found)
            whole = f"^{LONG[:length]}$"
            joined = "".join(found)
            assert joined == whole or (limit == 2 and joined == whole[:-2] + whole[-2:][:1] + whole[-2:])
            assert (data.cutting.without_target, data.cutting.left_out, data.cutting.cut) == (1, 0, 0)


def test_what_was_cut_is_counted_and_a_cached_run_says_the_same(tmp_path: Path) -> None:
    lengths = [*range(1, 20), 90]  # characters of the prompts; 4 tokens more with <s>, the answer and </s>
    rows = [{"prompt": LONG[:n], "completion": "xy"} for n in lengths] + [{"prompt": "a", "completion": LONG}]
    settings: dict[str, Any] = {"train": write(tmp_path / "a.jsonl", rows), "format": "completion", "max_length": 12}
    expected = Cutting(
        samples=21,
        cut=sum(n + 4 > 12 for n in lengths),
        left_out=1,
        without_target=0,
        tokens_dropped=sum(max(0, n + 4 - 12) for n in lengths),
        length_95=int(np.sort([n + 4 for n in lengths] + [len(LONG) + 3])[19]),
    )
    assert prepared(tmp_path, **settings).cutting == expected == prepared(tmp_path, **settings).cutting
    long_enough = prepared(tmp_path, **settings | {"max_length": expected.length_95}).cutting
    assert long_enough.cut + long_enough.left_out <= 0.05 * long_enough.samples


def test_what_was_cut_is_counted_over_all_files(tmp_path: Path) -> None:
    rows = [{"prompt": LONG[:n], "completion": "xy"} for n in (2, 20, 30)]
    files = [(write(tmp_path / f"{n}.jsonl", some), 1.0) for n, some in enumerate((rows[:1], rows[1:]))]
    settings: dict[str, Any] = {"format": "completion", "max_length": 12}
    parted = prepared(tmp_path, train=files, **settings).cutting
    assert parted == prepared(tmp_path, train=write(tmp_path / "all.jsonl", rows), **settings).cutting
    assert (parted.samples, parted.cut, parted.tokens_dropped) == (3, 2, 12 + 22)


def test_a_conversation_whose_answer_is_no_token_is_left_out(tmp_path: Path) -> None:
    tokenizer = char_tokenizer(eos=False)
    tokenizer.chat_template = PLAIN.replace("</s>", "")
    talks = [[("user", "a"), ("assistant", answer)] for answer in ("", "b")]
    file = write(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks])
    data = prepared(tmp_path, tokenizer, train=file, format="chat")
    assert texts(data) == [("^[u]a[a]b", "b")] and data.cutting.without_target == 1


def test_conversations_without_a_trained_turn_are_counted_apart(tmp_path: Path) -> None:
    talks = [[("user", "a")], [("user", "a"), ("assistant", "b")], [("user", "a"), ("assistant", LONG)]]
    file = write(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks])
    tokenizer = char_tokenizer()
    tokenizer.chat_template = PLAIN
    cutting = prepared(tmp_path, tokenizer, train=file, format="chat", max_length=20).cutting
    assert (cutting.samples, cutting.without_target, cutting.left_out, cutting.cut) == (3, 1, 1, 0)


def test_the_default_of_a_new_setting_leaves_the_fingerprint_as_it_was(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    base = prepared(tmp_path, train=file, format="chat").fingerprint
    # What the tree before `truncation` and `tools` computed for this file, this tokenizer and these settings.
    assert base == "b405fe69311ecda69fa301607e5b54fc7cce0da016c2bed9736533ebe56351f1"
    assert prepared(tmp_path, train=file, format="chat", truncation="tokens").fingerprint != base
    assert prepared(tmp_path, train=file, format="chat", tools_field="functions").fingerprint != base
