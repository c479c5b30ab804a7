"""Files as people have them, and the sentence for each that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.sources import open_source

ROWS = [{"text": "first", "label": "a"}, {"text": "second\nline", "label": "b"}]


def read(path: Path) -> list[dict[str, object]]:
    return list(open_source(str(path), "train").read())


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.csv").write_text('text,label\nfirst,a\n"second\nline",b\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "lines.json", "a.csv", "a.parquet"):
        assert read(tmp_path / name) == ROWS, name


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_a_text_of_a_megabyte_is_one_value(name: str, tmp_path: Path) -> None:
    """Python's own CSV reader takes 131,072 characters unless it is told otherwise."""
    rows = [{"text": "a, b " * 200_000, "label": "x"}]
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        text = f'text,label\n"{rows[0]["text"]}",x\n' if name == "a.csv" else json.dumps(rows[0])
        (tmp_path / name).write_text(text)
    assert read(tmp_path / name) == rows


def test_a_byte_order_mark_and_windows_line_ends_are_tolerated(tmp_path: Path) -> None:
    lines = "\r\n".join(json.dumps({"text": f"{i}"}) for i in range(2)) + "\r\n\r\n"
    for name, body in {
        "a.jsonl": lines,
        "a.json": '[\r\n{"text": "0"},\r\n{"text": "1"}\r\n]',
        "a.csv": "\r\ntext\r\n0\r\n\r\n1\r\n\r\n",
    }.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + body.encode())
        assert read(tmp_path / name) == [{"text": "0"}, {"text": "1"}], name
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read(tmp_path / "a.txt") == [{"text": "one\ntwo"}]


@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl is not JSON at line 2"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "a.json is not JSON at line 2"),
        ("a.json", '"text"', "holds str; accepted: an array"),
        ("a.jsonl", "[1]", "line 1 is list"),
        ("a.csv", "a,b\n1,2,3\n", "line 2 has more fields"),
        ("a.parquet", "no parquet", "a.parquet is not parquet"),
        ("a.jsonl", "", "an empty file"),
        ("a.xml", "<a/>", "unknown kind; accepted: .json, .jsonl, .csv, .parquet, .txt"),
    ],
)
def test_a_faulty_file_is_one_sentence(tmp_path: Path, name: str, body: str, sentence: str) -> None:
    (tmp_path / name).write_text(body)
    with pytest.raises(UsageError) as caught:
        read(tmp_path / name)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_one_that_is_not_text_are_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="a folder"):
        read(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(UsageError, match="not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_a_hub_name_that_cannot_be_had_is_said_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UsageError,
        match=r"data\.train is 'someone/some-data', which is not here, and .* in 1 try \(HF_HUB_OFFLINE is set",
    ):
        open_source("someone/some-data", "train")
