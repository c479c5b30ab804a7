"""A prompt with a better and a worse answer, as texts: which tokens, what is cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.preference import SAME
from dist_subspace.training.data.preference_batch import split_pair, split_single
from tests.training.data.tokens_for_tests import char_tokenizer, prepared, texts


def file_of(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pair(**columns: Any) -> dict[str, Any]:
    return {"prompt": "ask ", "chosen": "yes", "rejected": "never"} | columns


def test_both_answers_stand_behind_the_prompt_and_end(tmp_path: Path) -> None:
    data = prepared(tmp_path, train=file_of(tmp_path, pair(), pair(rejected="")), format="preference", max_length=40)
    assert texts(data) == [("^ask yes$^ask never$", "yes$never$"), ("^ask yes$^ask $", "yes$$")]
    decode = char_tokenizer().decode
    assert [decode(ids) for ids in split_pair(data.train, 0)] == ["<s>ask ", "yes</s>", "never</s>"]


def test_a_prompt_that_is_in_both_answers_is_told_as_trl_tells_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
    records = [
        {"chosen": "Who? Me.", "rejected": "Who? You."},
        {"chosen": "one two three", "rejected": "one two four"},
        {"chosen": "2 + 2 is 4", "rejected": "2 + 2 is 5"},
    ]
    data = prepared(tmp_path, train=file_of(tmp_path, *records), format="preference", max_length=40)
    decode = char_tokenizer().decode
    for number, record in enumerate(records):
        found = [decode(ids, skip_special_tokens=True) for ids in split_pair(data.train, number)]
        told = trl.extract_prompt(record)
        assert found == [told["prompt"], told["chosen"], told["rejected"]]


def test_a_prompt_gives_way_on_its_left_to_the_longer_answer(tmp_path: Path) -> None:
    records = [pair(), pair(chosen="x" * 11), pair(chosen="x" * 12), pair(chosen="yes", rejected="yes")]
    data = prepared(tmp_path, train=file_of(tmp_path, *records), format="preference", max_length=10)
    assert texts(data) == [("^sk yes$^sk never$", "yes$never$")]
    assert (data.cutting.cut, data.cutting.left_out, data.cutting.tokens_dropped) == (1, 2, 1)
    assert data.notices == [SAME.format(count=1)]


def test_single_answers_keep_their_labels(tmp_path: Path) -> None:
    values: list[Any] = [True, 0, "False", 1.0]
    records = [{"prompt": f"{n}?", "completion": "so", "label": value} for n, value in enumerate(values)]
    data = prepared(tmp_path, train=file_of(tmp_path, *records), format="unpaired-preference", max_length=20)
    assert [data.train.label(i) for i in range(4)] == ["true", "false", "false", "true"]
    assert data.train.target_counts.tolist() == [3] * 4 and data.labels is None
    assert [char_tokenizer().decode(ids) for ids in split_single(data.train, 1)] == ["<s>1?", "so</s>"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (pair(chosen=[{"role": "assistant", "content": "a"}]), "accepted with messages: chat-preference"),
        ({"chosen": "a", "rejected": "b"}, "its answers do not begin alike; accepted: a prompt"),
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "label 'good'; accepted: true (desirable) or false"),
    ],
)
def test_a_record_that_says_something_else_is_refused(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    form = "unpaired-preference" if "label" in record else "preference"
    with pytest.raises(UsageError) as caught:
        prepared(tmp_path, train=file_of(tmp_path, record), format=form)
    assert message in str(caught.value) and "record 1" in str(caught.value)


def test_a_prompt_without_a_token_is_refused(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(UsageError, match="empty prompt"):
        prepared(tmp_path, tokenizer, train=file_of(tmp_path, pair(prompt="")), format="preference")
