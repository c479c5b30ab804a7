"""What a run says of samples that `max_length` does not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.loading.tokenizer import load_tokenizer
from dist_subspace.training.data.cutting import Cutting
from dist_subspace.training.data.cutting_text import cutting_text
from tests.tiny_run import make_tokenizer
from tests.training.data.tokens_for_tests import char_tokenizer, prepared


def test_nothing_is_said_where_every_sample_is_whole() -> None:
    assert cutting_text(Cutting(600, 0, 0, 0, 0, 200), 256) == ([], False)
    assert cutting_text(Cutting(0, 0, 0, 0, 0, 0), 256) == ([], False)


def test_each_kind_is_counted_with_its_share_and_a_few_are_no_warning() -> None:
    sentences, warning = cutting_text(Cutting(2000, 40, 1, 2, 4000, 250), 256)
    assert sentences == [
        "data.max_length 256 cuts 40 of 2,000 samples (2.0%): they lose 4,000 tokens of their older text, 100 each on average",
        "1 of 2,000 samples (below 0.1%) are left out: their answer alone is longer than data.max_length 256",
        "2 of 2,000 samples (0.1%) are left out: they hold nothing to train",
    ]
    assert not warning


def test_more_than_a_few_percent_are_a_warning_with_the_length_that_keeps_them() -> None:
    sentences, warning = cutting_text(Cutting(600, 567, 0, 0, 61_236, 731), 256)
    assert warning and len(sentences) == 2
    assert "cuts 567 of 600 samples (94.5%): they lose 61,236 tokens of their older text, 108 each" in sentences[0]
    assert sentences[1] == "data.max_length=731 would keep 95% of them whole"
    sentences, warning = cutting_text(Cutting(100, 0, 8, 0, 0, 400), 256)
    assert warning and "8 of 100 samples (8.0%) are left out: their answer alone" in sentences[0]
    sentences, warning = cutting_text(Cutting(100, 0, 0, 8, 0, 100), 256)
    assert warning and sentences == ["8 of 100 samples (8.0%) are left out: they hold nothing to train"]


RECORDS: dict[str, list[dict[str, Any]]] = {
    "completion": [{"prompt": "p" * n, "completion": "c" * 9} for n in (5, 6, 40, 60)],
    "alpaca": [{"instruction": "i" * n, "output": "o" * 9} for n in (5, 6, 40, 60)],
    "classification": [{"text": "t" * n, "label": n % 2} for n in (5, 6, 60, 91)],
    "chat": [
        {"messages": [{"role": "user", "content": "u" * n}, {"role": "assistant", "content": "a"}]} for n in (5, 9, 90)
    ],
}


@pytest.mark.parametrize("kind", RECORDS)
def test_the_length_that_is_named_keeps_what_it_says(kind: str, tmp_path: Path) -> None:
    """At that length nothing is cut any more but what 95% leave; with so few samples that is nothing."""
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS[kind])))
    short = {"alpaca": 60, "chat": 60}.get(kind, 30)
    cut = prepared(tmp_path, train=str(file), format=kind, max_length=short).cutting
    sentences, warning = cutting_text(cut, short)
    assert warning and cut.cut > 0 and f"data.max_length={cut.length_95} would keep 95%" in sentences[-1]
    again = prepared(tmp_path, train=str(file), format=kind, max_length=cut.length_95).cutting
    assert (again.cut, again.left_out) == (0, 0) and cutting_text(again, cut.length_95) == ([], False)


@pytest.mark.parametrize("kind", [*RECORDS, "text"])
@pytest.mark.parametrize("fast", [True, False])
def test_transformers_says_nothing_of_indexing_errors(
    kind: str, fast: bool, tmp_path: Path, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is longer than the tokenizer's own limit is cut by us: there will be no such error."""
    tokenizer = (
        make_tokenizer() if fast else load_tokenizer("x", str(data_dir / "tokenizers" / "mistral-v1-32000.model"))
    )
    assert tokenizer.is_fast == fast
    tokenizer.model_max_length = 16
    rows = RECORDS.get(kind, [{"text": "text " * 40}])
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer.pad_token = tokenizer.eos_token
    prepared(tmp_path, tokenizer, train=str(tmp_path / "a.jsonl"), format=kind, max_length=200)
    assert not any(tokenizer.deprecation_warnings.values()) and "indexing" not in caplog.text
    assert char_tokenizer().deprecation_warnings == {}
