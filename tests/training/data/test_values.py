"""What a record's writer meant: missing values, numbers, codes, and the place of a fault, in every kind of file."""

from __future__ import annotations

import datetime
import json
import math
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.sources import open_source
from tests.training.data.tokens_for_tests import prepared, texts


def read(path: Path) -> list[dict[str, Any]]:
    return list(open_source(str(path), "train").read())


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    str(caught.value).encode("utf-8")  # it can be printed
    return str(caught.value).replace(f"{path.parent}/", "")


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# Missing values.


def test_a_number_that_is_none_is_missing_in_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": NaN, "n": 1.5, "more": [{"x": NaN}]}]')
    (tmp_path / "a.jsonl").write_text('{"text": NaN, "n": 1.5, "more": [{"x": NaN}]}\n')
    parquet(tmp_path / "a.parquet", text=[math.nan], n=[1.5], more=[[{"x": math.nan}]])
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert read(tmp_path / name) == [{"text": None, "n": 1.5, "more": [{"x": None}]}], name


@pytest.mark.parametrize("body", ['{"prompt": "a", "completion": NaN}', '{"prompt": "a", "completion": null}'])
def test_a_missing_answer_is_refused_and_is_not_the_word_nan(body: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + body)
    with pytest.raises(UsageError, match="record 2 has null in column 'completion'"):
        prepared(tmp_path, train=str(tmp_path / "a.jsonl"), format="completion")


def test_a_missing_input_is_an_absent_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"instruction": "i", "input": NaN, "output": "o"}]')
    parquet(tmp_path / "a.parquet", instruction=["i"], input=pyarrow.array([math.nan]), output=["o"])
    for name in ("a.json", "a.parquet"):
        (sample,) = texts(prepared(tmp_path, train=str(tmp_path / name)))
        assert "Input" not in sample[0] and "nan" not in sample[0]


def test_numbers_are_text_and_infinity_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 5}\n{"text": 1.5}\n{"text": 123456789012345678901234567890}')
    assert [text for text, _ in texts(prepared(tmp_path, train=str(tmp_path / "a.jsonl"), format="text"))] == [
        "^5$",
        "^1.5$",
        "^123456789012345678901234567890$",
    ]
    (tmp_path / "c.jsonl").write_text('{"text": true}\n{"text": false}')
    parquet(tmp_path / "c.parquet", text=[True, False])
    for name in ("c.jsonl", "c.parquet"):
        found = prepared(tmp_path, train=str(tmp_path / name), format="text")
        assert [text for text, _ in texts(found)] == ["^true$", "^false$"]  # as JSON and the labels write them
    (tmp_path / "b.jsonl").write_text('{"text": Infinity}')
    with pytest.raises(
        UsageError, match="record 1 has inf in column 'text'; accepted: text, or a number that is finite"
    ):
        prepared(tmp_path, train=str(tmp_path / "b.jsonl"), format="text")


def test_a_cell_of_a_csv_stays_the_text_that_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nnan,\nNA,007\n")
    assert read(tmp_path / "a.csv") == [{"text": "nan", "n": ""}, {"text": "NA", "n": "007"}]


# Names.


def test_a_name_that_two_columns_have_is_refused_in_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ntext,label,text\na,b,c\n")
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{"text": "a", "text": "b"}]')
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "a", "x": 1, "text": "b"}')
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.csv") == "a.csv: line 2 has the column 'text' twice; accepted: each name once"
    assert "has 'text' twice" in refusal(tmp_path / "a.json")
    assert "an object from line 3 on has 'text' twice" in refusal(tmp_path / "a.jsonl")
    assert (
        refusal(tmp_path / "a.parquet") == "a.parquet: its schema has the column 'text' twice; accepted: each name once"
    )


def test_columns_without_a_name_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",text,,\n0,a,,\n1,b,,\n")
    assert [row["text"] for row in read(tmp_path / "a.csv")] == ["a", "b"]


# Text that cannot be text.


@pytest.mark.parametrize("half", ["\\ud800", "\\udfff", "good \\ud83d bad"])
def test_half_of_a_surrogate_pair_is_one_sentence(half: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "x", "messages": [{"content": "' + half + '"}]}')
    (tmp_path / "a.json").write_text('[{"text": "' + half + '"}]')
    assert "record 2 has half of a surrogate pair in column 'messages', \\ud" in refusal(tmp_path / "a.jsonl")
    assert "record 1 has half of a surrogate pair in column 'text'" in refusal(tmp_path / "a.json")


def test_a_whole_surrogate_pair_is_its_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42"}')
    assert read(tmp_path / "a.jsonl") == [{"text": "🙂"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_number_of_five_thousand_digits_and_deep_nesting_are_one_sentence(name: str, tmp_path: Path) -> None:
    brackets = ("[", "]") if name == "a.json" else ("", "")
    (tmp_path / name).write_text(brackets[0] + '{"text": ' + "9" * 5000 + "}" + brackets[1])
    assert "number of too many digits from line 1 on" in refusal(tmp_path / name)
    (tmp_path / name).write_text(brackets[0] + '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}" + brackets[1])
    assert "nested too deeply" in refusal(tmp_path / name)
    for depth in (300, 600, 900, 990):  # near the limit of what Python reads
        (tmp_path / name).write_text(brackets[0] + '{"text": ' + "[" * depth + "]" * depth + "}" + brackets[1])
        try:
            assert len(read(tmp_path / name)) == 1
        except UsageError as error:
            assert "nested too deeply" in str(error)


def test_a_byte_that_is_no_text_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    long = b'{"text": "' + b"x" * 100_000 + b'"}\n'
    for name, body in {
        "a.jsonl": long * 3 + b'{"text": "\xe9"}\n',
        "a.txt": b"\xef\xbb\xbf" + long * 3 + b"ab \xff",
        "a.json": b"[\n" + long[:-1] + b",\n" + b'{"text": "\xfe"}]',
        "a.csv": b"text\r\n" + b"y" * 70_000 + b"\r\nz\xc3\x28\r\n",
    }.items():
        (tmp_path / name).write_bytes(body)
        try:
            body.decode("utf-8")
            raise AssertionError("the body is meant to be broken")
        except UnicodeDecodeError as error:
            offset, line = error.start, body[: error.start].count(b"\n") + 1
        assert f"byte 0x{body[offset]:02x} at offset {offset:,}, in line {line}" in refusal(tmp_path / name), name


def test_utf_16_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}'.encode("utf-16"))
    assert refusal(tmp_path / "a.jsonl") == "a.jsonl is UTF-16 text; accepted: UTF-8"


# Lines.


@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("a.jsonl", '\ufeff{"a": 1}\n\n\n{"a" 1}\n', "is not JSON at line 4"),
        ("a.jsonl", '{"a": 1}\r\n{"a": 1}\r\n{"a": \r\n', "is not JSON at line 3"),
        ("a.jsonl", '{"a": 1}\n7\n', "line 2 is int"),
        ("a.jsonl", '{\n "a": 1,\n "b": oops\n}\n', "is not JSON at line 3"),
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n{"a": 3}\n', "is not JSON at line 2"),
        ("a.jsonl", '{"a": 1}\n{"a": "cut\n{"a": 2}\n', "is not JSON at line 2"),
        ("a.jsonl", '{"a": 1}\n{\n "a": 2,\n "b": {\n', "is not JSON at line 4"),
        ("a.jsonl", '{"a": 1} {"a": 2}\n', "is not JSON at line 1: Extra data"),
        ("a.json", '{\n "a": 1\n}\n{\n "b": 1,\n}\n', "is not JSON at line 6"),
        ("a.json", '[\n{"a": 1},\n\n{"a" 1}\n]', "is not JSON at line 4"),
        ("a.json", '[{"a": 1},\n', "is not JSON at line 1"),
        ("a.csv", 'a,b\n"x\ny\nz",1\n"p\nq",1,2\n', "line 5 has more fields than the header"),
        ("a.csv", '\ufeff\n\na,b\n\n"x",1\n1,2,3\n', "line 6 has more fields than the header"),
        ("a.csv", 'a,b\n1,2\n"never closed,3\n4,5\n', "is not CSV at line 4, in the row from line 3 on"),
        ("a.csv", 'a,b\n1,2\n"x"y,3\n', "is not CSV at line 3"),
        ("a.jsonl", " \n\n", "holds no records"),
        ("a.json", "[]", "holds no records"),
        ("a.json", "  \n", "is not JSON at line 1"),
        ("a.csv", "text,label\n", "holds no records"),
    ],
)
def test_a_line_in_a_message_is_the_files_own(name: str, body: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(body, "utf-8", newline="")
    assert sentence in refusal(tmp_path / name)


def test_an_object_over_several_lines_is_a_record(tmp_path: Path) -> None:
    rows = [{"text": "a", "more": {"x": [1, 2]}}, {"text": "b"}, {"text": "c"}]
    whole = "\n".join(json.dumps(row, indent=2) for row in rows)
    mixed = json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1], indent=4) + "\n" + json.dumps(rows[2])
    for body, expected in ((whole, rows), (mixed, rows), (json.dumps(rows[0], indent=1), rows[:1])):
        for name in ("a.json", "a.jsonl"):
            (tmp_path / name).write_text(body)
            assert read(tmp_path / name) == expected


def test_a_large_object_over_many_lines_is_read_in_time(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n} {m}"} for m in range(3000)]} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    began = time.monotonic()
    assert read(tmp_path / "a.jsonl") == rows
    assert time.monotonic() - began < 5


def test_lines_with_every_kind_of_end_are_rows_of_a_csv(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.csv").write_text(end.join(["text", '"a"', "b", ""]), newline="")
        assert read(tmp_path / "a.csv") == [{"text": "a"}, {"text": "b"}]


# Parquet.


def test_types_of_parquet_that_are_no_text_are_refused_where_text_is_needed(tmp_path: Path) -> None:
    for value in (b"bytes", datetime.date(2020, 1, 1), ["a list"], {"a": "struct"}):
        parquet(tmp_path / "a.parquet", text=[value])
        with pytest.raises(UsageError, match=r"record 1 has (bytes|date|list|dict) in column 'text'; accepted: text"):
            prepared(tmp_path, train=str(tmp_path / "a.parquet"), format="text")


def test_a_damaged_parquet_is_one_sentence(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=[f"row {n}" for n in range(2000)])
    whole = path.read_bytes()
    for damage in (whole[:-20], whole[: len(whole) // 2], whole[:40] + b"\xff" * 200 + whole[240:]):
        path.write_bytes(damage)
        assert refusal(path).startswith("a.parquet ")
    text = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    assert refusal(path) == "a.parquet has a column of text that is not UTF-8: invalid start byte"
    parquet(path, text=pyarrow.array([], pyarrow.string()))
    assert refusal(path) == "a.parquet holds no records"
    parquet(path, when=pyarrow.array([2**62], pyarrow.timestamp("us")))
    assert "has a value that cannot be read" in refusal(path)


# Labels.


def labels(tmp_path: Path, name: str, values: list[Any]) -> tuple[list[str], list[str]]:
    """(names by id, the label of each record)."""
    file = tmp_path / name
    if name.endswith(".csv"):
        file.write_text("text,label\n" + "".join(f"t{n},{value}\n" for n, value in enumerate(values)))
    elif name.endswith(".parquet"):
        parquet(file, text=[f"t{n}" for n in range(len(values))], label=values)
    else:
        file.write_text("\n".join(json.dumps({"text": f"t{n}", "label": value}) for n, value in enumerate(values)))
    data = prepared(tmp_path, train=str(file), format="classification")
    assert data.labels is not None
    return data.labels, [data.labels[int(data.train.sample(n)[1][0])] for n in range(len(values))]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["01", "1", "10"], ["01", "1", "10"]),
        (["007", "010", "099"], ["007", "010", "099"]),
        (["0", "1", "2"], ["0", "1", "2"]),
        (["1", "3", "2"], ["0", "1", "2", "3"]),
        (["A", "1", "01"], ["01", "1", "A"]),
        (["-1", "1", "0"], ["-1", "0", "1"]),
        (["1" * 5000, "2"], ["1" * 5000, "2"]),
        (["²", "1", "b"], ["1", "b", "²"]),
    ],
)
def test_labels_that_are_text_are_told_apart_as_they_stand(
    name: str, values: list[str], names: list[str], tmp_path: Path
) -> None:
    assert labels(tmp_path, name, values) == (names, values)


def test_labels_that_are_numbers_are_class_ids(tmp_path: Path) -> None:
    assert labels(tmp_path, "a.jsonl", [2, 0, 1]) == (["0", "1", "2"], ["2", "0", "1"])
    assert labels(tmp_path, "b.parquet", [1.0, 0.0, 2.0]) == (["0", "1", "2"], ["1", "0", "2"])
    assert labels(tmp_path, "c.jsonl", [True, False, True]) == (["false", "true"], ["true", "false", "true"])
    assert labels(tmp_path, "d.jsonl", [1, "1", 0]) == (["0", "1"], ["1", "1", "0"])


@pytest.mark.parametrize("value", [0.5, math.nan, None, "", "  ", [1], math.inf])
def test_a_label_that_is_none_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"record 2 has .* label"):
        labels(tmp_path, "a.jsonl", [1, value])


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"column {n}": n for n in range(5000)}))
    with pytest.raises(UsageError) as caught:
        prepared(tmp_path, train=str(tmp_path / "a.jsonl"), format="text")
    assert len(str(caught.value)) < 600 and "4976 more" in str(caught.value)
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}')
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "a", "label": "y" * 9999}))
    with pytest.raises(UsageError) as caught:
        prepared(
            tmp_path, train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"), format="classification"
        )
    assert len(str(caught.value)) < 400
