"""Records of CSV and parquet: the columns by their names; what is broken is told with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data.tables import read_csv, read_parquet


def csv_of(tmp_path: Path, text: str) -> list[dict[str, Any]]:
    file = tmp_path / "a.csv"
    file.write_text(text, encoding="utf-8", newline="")
    return list(read_csv(file))


def test_rows_have_the_names_of_the_first_line_that_is_not_blank(tmp_path: Path) -> None:
    found = csv_of(tmp_path, '\ufeff\r\na,b\r\n1,"x\r\ny, ""z"""\r\n\r\n2\r\n')
    assert found == [{"a": "1", "b": 'x\r\ny, "z"'}, {"a": "2"}]
    assert csv_of(tmp_path, "") == [] and csv_of(tmp_path, "a,b\n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "line 3 has more fields than the header"),
        ('a,b\n"1\n2",3\n4,5,6\n', "line 4 has more fields than the header"),  # a row over two lines before it
        ("a,b,a\n1,2,3\n", "line 1 has the column 'a' twice; accepted: each name once"),
        ('a\n"x"y\n', "is not CSV at line 2: "),
        ('a\n1\n"open\nto\nthe end', "is not CSV at line 5, in the row from line 3 on: "),
    ],
)
def test_a_row_that_is_broken_is_told_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        csv_of(tmp_path, text)


def test_columns_without_a_name_may_be_many(tmp_path: Path) -> None:
    assert csv_of(tmp_path, "a,,\n1,2,3\n")[0]["a"] == "1"


def test_a_long_field_is_no_fault(tmp_path: Path) -> None:
    assert len(csv_of(tmp_path, f"a\n{'x' * 200_000}\n")[0]["a"]) == 200_000


def test_parquet_is_its_rows_and_what_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, None], "b": ["x", "y"]}), file)
    assert list(read_parquet(file)) == [{"a": 1, "b": "x"}, {"a": None, "b": "y"}]
    file.write_bytes(b"not parquet at all")
    with pytest.raises(UsageError, match=r"a\.parquet is not parquet: "):
        list(read_parquet(file))


def test_a_parquet_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array([1]), pyarrow.array([2])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="its schema has the column 'a' twice"):
        list(read_parquet(tmp_path / "a.parquet"))
