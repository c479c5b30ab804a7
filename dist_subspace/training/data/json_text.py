"""JSON as people have it: an array, an object a line, or objects over several lines. A fault names the file's own line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.values import shown

Record = dict[str, Any]
BLANKS = " \t\r\n"


def read_json(file: Path) -> Iterator[Record]:
    """One array of objects; objects one after the other are taken too, since many such files are called .json."""
    text = file.read_text("utf-8-sig")
    if text.lstrip(BLANKS)[:1] == "{":
        yield from read_json_lines(file)
        return
    try:
        rows = _DECODER.decode(text.rstrip(BLANKS))
    except (ValueError, RecursionError) as error:
        raise _fault(error, file, 1) from error
    if not isinstance(rows, list):
        raise UsageError(f"{file} holds {type(rows).__name__}; accepted: an array of objects")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{file}: element {number} is {type(row).__name__}; accepted: objects")
        yield row


def read_json_lines(file: Path) -> Iterator[Record]:
    """An object a line; one that is spread over lines is taken as well."""
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip(BLANKS):
                continue
            try:
                row = _DECODER.decode(line.rstrip(BLANKS))
            except json.JSONDecodeError as error:
                yield from _spread((line + lines.read()).rstrip(BLANKS), error, file, number)
                return
            except (ValueError, RecursionError) as error:
                raise _fault(error, file, number) from error
            yield _object(row, file, number)


def _spread(text: str, fault: json.JSONDecodeError, file: Path, line: int) -> Iterator[Record]:
    """Objects one after the other, from the given line of the file on, whose first line alone has the given fault.

    A line that only opens an object is no broken line: what is wrong is said of the place where the object breaks.
    """
    opens = text.partition("\n")[0].strip(BLANKS) in ("{", "[")
    place = _next(text, 0)
    while place < len(text):
        begins = line + text.count("\n", 0, place)
        try:
            row, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            first = begins == line and not opens and isinstance(error, json.JSONDecodeError)
            raise _fault(fault if first else error, file, line) from error
        yield _object(row, file, begins)
        place = _next(text, end)


def _next(text: str, place: int) -> int:
    return len(text) - len(text[place:].lstrip(BLANKS))


def _object(row: Any, file: Path, line: int) -> Record:
    if not isinstance(row, dict):
        raise UsageError(f"{file}: line {line} is {type(row).__name__}; accepted: an object a line")
    return row


def _fault(error: Exception, file: Path, line: int) -> UsageError:
    """What is wrong with a text that begins at that line of the file."""
    if isinstance(error, json.JSONDecodeError):
        return UsageError(f"{file} is not JSON at line {line + error.lineno - 1}: {error.msg}")
    if isinstance(error, _Twice):
        return UsageError(
            f"{file}: an object from line {line} on has {shown(error.key)} twice; accepted: each name once"
        )
    if isinstance(error, RecursionError):
        return UsageError(f"{file} is nested too deeply from line {line} on; accepted: records of text")
    # Python reads no number of more than some thousand digits.
    return UsageError(
        f"{file} has a number of too many digits from line {line} on; accepted: numbers of that size as text"
    )


class _Twice(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _once(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(next(key for place, (key, _) in enumerate(pairs) if key in [k for k, _ in pairs[:place]]))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
