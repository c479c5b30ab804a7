"""JSON as people have it: an array, an object a line, or objects over several lines. A fault names the file's own line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.values import shown

Record = dict[str, Any]
BLANKS = " \t\r\n"
LONGEST = 1 << 22  # characters of a record that is spread over lines
SMALL = 1 << 14  # of these, so many are read again at every line that may be the last


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
    """An object a line; one that is spread over lines is taken as well. Holds one record at a time."""
    spread: _Spread | None = None
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            text = line.rstrip(BLANKS)
            if spread is not None:
                spread.add(text, file)
                if not spread.may_end(text):
                    continue
            elif not text:
                continue
            first_line, whole_text = (number, text) if spread is None else (spread.line, spread.text)
            try:
                row = _DECODER.decode(whole_text)
            except json.JSONDecodeError as error:
                if error.pos < len(whole_text):  # broken, whatever comes
                    raise _fault(error, file, first_line) from error
                spread = spread or _Spread(whole_text, first_line, error)
                continue
            except (ValueError, RecursionError) as error:
                raise _fault(error, file, first_line) from error
            spread = None
            yield _object(row, file, first_line)
    if spread is not None:
        raise spread.broken(file)


@dataclass
class _Spread:
    """An object that its first line does not close: its text so far, where it begins, and what is wrong with that line alone."""

    text: str
    line: int
    fault: json.JSONDecodeError

    def add(self, text: str, file: Path) -> None:
        # A whole object at the beginning of a line is the next record: then the line before is broken, and nothing is spread.
        next_record = not self.opens and text.startswith("{") and text.endswith("}")
        if next_record or len(self.text) > LONGEST:
            raise self.broken(file)
        self.text += f"\n{text}"

    def may_end(self, text: str) -> bool:
        """Whether it is worth while to read it: a writer that indents closes at the beginning of a line."""
        return text.endswith(("}", "]")) and (text[0] in "}]" or len(self.text) < SMALL)

    @property
    def opens(self) -> bool:
        return self.text.partition("\n")[0].strip(BLANKS) in ("{", "[")

    def broken(self, file: Path) -> UsageError:
        """The place where it breaks; a line that holds more than a bracket was meant to be whole."""
        try:
            _DECODER.decode(self.text)
        except (ValueError, RecursionError) as error:
            return _fault(error if self.opens else self.fault, file, self.line)
        return _fault(self.fault, file, self.line)


def _object(row: Any, file: Path, line: int) -> Record:
    if not isinstance(row, dict):
        raise UsageError(f"{file}: line {line} is {type(row).__name__}; accepted: an object a line")
    return row


def _fault(error: Exception, file: Path, line: int) -> UsageError:
    """What is wrong with a text that begins at that line of the file."""
    if isinstance(error, json.JSONDecodeError):
        return UsageError(f"{file} is not JSON at line {line + error.lineno - 1}: {error.msg}")
    if isinstance(error, _RepeatedName):
        return UsageError(
            f"{file}: an object from line {line} on has {shown(error.key)} twice; accepted: each name once"
        )
    if isinstance(error, RecursionError):
        return UsageError(f"{file} is nested too deeply from line {line} on; accepted: records of text")
    # Python reads no number of more than some thousand digits.
    return UsageError(
        f"{file} has a number of too many digits from line {line} on; accepted: numbers of that size as text"
    )


class _RepeatedName(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _RepeatedName(next(key for place, (key, _) in enumerate(pairs) if key in [k for k, _ in pairs[:place]]))
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)
