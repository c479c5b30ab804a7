"""Tokenised once; the second time only mapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data import DataSettings, prepare
from tests.training.data.tokens_for_tests import CountingTokenizer, char_tokenizer, prepared


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def test_a_second_call_tokenises_nothing_and_maps_the_same_tokens(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    tokenizer = char_tokenizer(CountingTokenizer)
    first = prepared(tmp_path, tokenizer, train=file, format="text")
    before = CountingTokenizer.calls
    second = prepared(tmp_path, tokenizer, train=file, format="text")
    marks = 4  # the probes for the marks at begin and end, which the cache's key needs
    assert before > 0 and CountingTokenizer.calls - before <= marks
    assert isinstance(second.train.parts[0].columns.ids, np.memmap)
    assert first.fingerprint == second.fingerprint
    for i in range(20):
        assert all(np.array_equal(a, b) for a, b in zip(first.train.sample(i), second.train.sample(i)))


def test_another_content_tokenizer_length_or_format_is_another_fingerprint_and_another_path_is_not(
    tmp_path: Path,
) -> None:
    file = lines(tmp_path / "a.jsonl", ["abc", "def"])
    same = lines(tmp_path / "copy.jsonl", ["abc", "def"])
    other = lines(tmp_path / "b.jsonl", ["abc", "deg"])
    base = prepared(tmp_path, train=file, format="text").fingerprint
    assert prepared(tmp_path, train=same, format="text").fingerprint == base
    found = {
        prepared(tmp_path, train=other, format="text").fingerprint,
        prepared(tmp_path, train=file, format="text", max_length=9).fingerprint,
        prepared(tmp_path, char_tokenizer(eos=False), train=file, format="text").fingerprint,
        prepared(tmp_path, train=[(file, 2.0)], format="text").fingerprint,
        prepared(tmp_path, train=file, format="text", eval=0.5).fingerprint,
        base,
    }
    assert len(found) == 6


def test_the_seed_is_in_the_fingerprint_where_it_draws_what_is_held_out_and_there_alone(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", ["abc", "def", "ghi", "jkl"])
    for held_out, different in ((None, 1), (0.5, 2)):
        found = {prepared(tmp_path, seed=s, train=file, format="text", eval=held_out).fingerprint for s in (0, 1)}
        assert len(found) == different


def test_what_a_tokenizer_was_last_asked_for_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    file, tokenizer = lines(tmp_path / "a.jsonl", ["abc", "defgh"]), char_tokenizer()
    base = prepared(tmp_path, tokenizer, train=file, format="text").fingerprint
    tokenizer(["a long one", "a"], padding="max_length", truncation=True, max_length=4)
    assert prepared(tmp_path, tokenizer, train=file, format="text").fingerprint == base


def test_a_damaged_or_half_written_cache_is_made_anew(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", ["abc", "def"])
    whole = prepared(tmp_path, train=file, format="text")
    (folder,) = (tmp_path / "cache").iterdir()
    expected = whole.train.sample(1)[0].copy()
    for name in ("ids.npy", "columns.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-2])
        again = prepared(tmp_path, train=file, format="text")
        assert np.array_equal(again.train.sample(1)[0], expected)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]  # nothing hidden is left over


def test_a_held_out_fraction_is_a_function_of_the_seed_and_is_never_trained_on(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", [f"{i:03}" * 3 for i in range(50)])  # three pieces a record

    def sides(seed: int) -> tuple[set[str], set[str]]:
        data = prepared(tmp_path, seed=seed, train=file, format="text", eval=0.2, max_length=5)
        assert data.eval is not None
        return tuple(
            {str(table.parts[0].columns.records[row]) for row in table.parts[0].rows}
            for table in (data.train, data.eval)
        )  # type: ignore[return-value]

    train, held = sides(0)
    assert len(held) == 10 and len(train) == 40 and not train & held
    assert sides(0)[1] == held != sides(1)[1]


def test_a_single_document_is_held_out_by_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij" * 10)
    data = prepared(tmp_path, train=str(tmp_path / "a.txt"), format="text", eval=0.1, max_length=5)
    assert data.eval is not None and len(data.eval) == 2 and len(data.train) == 19


@pytest.mark.parametrize(("format", "task"), [("text", "classification"), ("classification", "causal-lm")])
def test_a_format_that_is_not_the_tasks_is_refused_before_a_file_is_read(
    format: str, task: str, tmp_path: Path
) -> None:
    said = rf"^data\.format is '{format}' with model\.task '{task}'; classification goes with classification only$"
    with pytest.raises(UsageError, match=said):
        prepare(DataSettings(train="absent.jsonl", format=format), char_tokenizer(), tmp_path, 0, False, task)


def test_a_cache_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UsageError, match=r"data\.cache_dir"):
        prepared(tmp_path, train=lines(tmp_path / "a.jsonl", ["abc"]), format="text")


def test_whatever_decides_on_the_tokens_is_in_the_name_of_their_store(tmp_path: Path) -> None:
    """Each of these changes what is tokenised, or into what: it never finds the tokens of the others."""
    rows = [{"instruction": "say it", "output": f"{n}", "answer": "no", "text": f"t {n}"} for n in range(3)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    template = char_tokenizer()
    template.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    other_end = char_tokenizer()
    other_end.eos_token = "<unk>"  # a mark that the vocabulary has: nothing else changes
    words = char_tokenizer()
    words.add_tokens(["say it"])
    base: dict[str, Any] = {"train": str(file), "format": "alpaca"}
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "as it is": (None, {}),
        "format": (None, {"format": "text"}),
        "max_length": (None, {"max_length": 100}),
        "template": (None, {"template": "{instruction}: "}),
        "column": (None, {"output_field": "answer"}),
        "truncation": (None, {"truncation": "tokens"}),
        "chat template": (template, {}),
        "vocabulary": (words, {}),
        "no end of sequence": (char_tokenizer(eos=False), {}),
        "another end of sequence": (other_end, {}),
    }
    stores: set[str] = set()
    for what, (tokenizer, changed) in cases.items():
        found = prepared(tmp_path, tokenizer, **base | changed)
        now = {path.name for path in (tmp_path / "cache").iterdir()}
        assert len(now) == len(stores) + 1, what
        stores = now
        assert len(found.train) == 3
    file.write_text(file.read_text().replace('"output": "2"', '"output": "7"'))
    prepared(tmp_path, **base)
    assert len(list((tmp_path / "cache").iterdir())) == len(stores) + 1


def test_a_disk_that_refuses_the_tokens_is_one_sentence_and_leaves_no_store(tmp_path: Path) -> None:
    """The kernel's own refusal: a limit on the size of files, below the largest column."""
    resource = pytest.importorskip("resource")
    file = lines(tmp_path / "a.jsonl", ["abc " * 100] * 40)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (20_000, 40_000):  # below a piece, and between a piece and a column
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(UsageError, match=r"data\.cache_dir is .*cannot be written: File too large"):
                prepared(tmp_path, train=file, format="text")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".parts-")]
    assert len(prepared(tmp_path, train=file, format="text").train) == 40
