"""CSV and parquet: records of tables. A fault names the file's own line, or the column."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.values import shown

Record = dict[str, Any]


def read_csv(file: Path) -> Iterator[Record]:
    """The first line that is not blank names the columns; a row that is shorter lacks the last ones."""
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, strict=True)
        first_line = 1  # the file's own line: a row may go over several
        try:
            header = next((row for row in rows if row), [])
            _check_names(header, file, f"line {rows.line_num}")
            first_line = rows.line_num + 1
            for row in rows:
                if len(row) > len(header):
                    raise UsageError(f"{file}: line {first_line} has more fields than the header")
                if row:
                    yield dict(zip(header, row))
                first_line = rows.line_num + 1
        except csv.Error as error:
            where = (
                f"line {rows.line_num}"
                if first_line >= rows.line_num
                else f"line {rows.line_num}, in the row from line {first_line} on"
            )
            raise UsageError(f"{file} is not CSV at {where}: {error}") from error


def read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        _check_names(table.schema_arrow.names, file, "its schema")
        for batch in table.iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"{file} is not parquet: {_first_line(error)}") from error
    except UsageError:  # which is a ValueError
        raise
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} has a column of text that is not UTF-8: {error.reason}") from error
    except (ValueError, OverflowError) as error:  # a time that Python's own types cannot hold
        raise UsageError(f"{file} has a value that cannot be read: {_first_line(error)}") from error


def _check_names(names: Sequence[str], file: Path, where: str) -> None:
    """A name that is blank cannot be asked for; any other must be one column's."""
    repeated = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    if repeated:
        raise UsageError(f"{file}: {where} has the column {shown(repeated[0])} twice; accepted: each name once")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
