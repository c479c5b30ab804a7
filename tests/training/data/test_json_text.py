"""Records of JSON: an array, an object a line, or objects that are spread over lines; what is broken is told with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.json_text import read_json, read_json_lines


def lines_of(tmp_path: Path, text: str) -> list[dict[str, Any]]:
    file = tmp_path / "a.jsonl"
    file.write_text(text, encoding="utf-8")
    return list(read_json_lines(file))


def whole(tmp_path: Path, text: str) -> list[dict[str, Any]]:
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8")
    return list(read_json(file))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('{"a": 1}\n{"a": 2}\n', 2),
        ('\ufeff{"a": 1}\r\n\r\n{"a": 2}', 2),
        ('{\n  "a": {\n    "b": 1\n  }\n}\n{\n  "a": 2\n}\n', 2),
        ('{"a":\n 1}\n', 1),
        ("", 0),
        (' \n\t\n{"a": "} {"}\n', 1),
    ],
    ids=repr,
)
def test_each_object_is_a_record_however_it_is_laid_out(tmp_path: Path, text: str, count: int) -> None:
    assert len(lines_of(tmp_path, text)) == count
    if count:
        assert whole(tmp_path, text) == lines_of(tmp_path, text)  # many such files are called .json


def test_an_array_is_its_objects(tmp_path: Path) -> None:
    assert whole(tmp_path, '\n[{"a": 1}, {"b": [2]}]\n') == [{"a": 1}, {"b": [2]}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": }\n', r"is not JSON at line 2: "),
        ('{"a": 1}\n{"a": 1\n{"a": 3}\n', r"is not JSON at line 2: "),  # a line that lacks its end, before a whole one
        ('{\n"a": 1,\n"b": x\n}\n', r"is not JSON at line 3: "),
        ('{"a": 1}\n[1]\n', r"line 2 is list; accepted: an object a line"),
        ('{"a": 1}\n{"b": 1, "b": 2}\n', r"an object from line 2 on has 'b' twice; accepted: each name once"),
        ('{"a": 1}\n{"b": ' + "1" * 5000 + "}\n", r"a number of too many digits from line 2 on"),
        ('{"a": 1}\n' + '{"b":' * 100_000 + "1" + "}" * 100_000, r"nested too deeply from line 2 on"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_line_that_is_broken_is_told_by_its_number(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lines_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"text"', "holds str; accepted: an array of objects"),
        ('[{"a": 1}, 2]', "element 2 is int; accepted: objects"),
        ('[{"a": 1},\n{"a" 2}]', "is not JSON at line 2: "),
    ],
)
def test_an_array_that_is_broken_is_told_by_its_line_or_element(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        whole(tmp_path, text)


def test_the_records_before_a_broken_one_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n{"a"\n')
    found = []
    with pytest.raises(UsageError, match="is not JSON at line 3"):
        for record in read_json_lines(file):
            found.append(record["a"])
    assert found == [1, 2]
