"""Values of records as their writers meant them, whatever kind of file they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from dist_subspace.errors import UsageError

SHOWN = 80  # characters of a value in a message


def cleaned(records: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """The records, numbers that are none (NaN) as null: that is what tables write where nothing is.

    Raises:
        UsageError: for text that cannot be written in UTF-8, and for a source without records.
    """
    number = 0
    for number, record in enumerate(records, 1):
        yield {key: _cleaned(value, key, source, number) for key, value in record.items()}
    if number == 0:
        raise UsageError(f"{source} holds no records")


def shown(value: Any) -> str:
    """A value in a message: its repr in ASCII where it must be, cut where it is long."""
    text = repr(value) if not isinstance(value, str) or _is_text(value) else ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def _cleaned(value: Any, column: str, source: str, number: int) -> Any:
    if isinstance(value, str):
        if not _is_text(value):
            raise UsageError(
                f"{source}: record {number} has half of a surrogate pair in column {shown(column)}, "
                f"{half_of_a_pair(value)}, which is no character; accepted: text that UTF-8 can hold"
            )
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: _cleaned(part, column, source, number) for key, part in value.items()}
    if isinstance(value, list):
        return [_cleaned(part, column, source, number) for part in value]
    return value


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def half_of_a_pair(value: str) -> str | None:
    """The first half of a surrogate pair that stands alone in the text, as JSON writes it."""
    return next((f"\\u{ord(character):04x}" for character in value if 0xD800 <= ord(character) <= 0xDFFF), None)
