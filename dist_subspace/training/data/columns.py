"""Taking the needed columns out of a record; a record without one is an error that names what is there."""

from __future__ import annotations

import math
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.settings import DataSettings
from dist_subspace.training.data.values import shown

MOST_NAMED = 24  # columns of a record that a message lists


class Row:
    """One record of a source, asked by the format's own column names (`data.*_field` renames them)."""

    def __init__(self, record: dict[str, Any], number: int, source: str, settings: DataSettings) -> None:
        self.record, self.number, self.source, self.settings = record, number, source, settings

    def __str__(self) -> str:
        return f"{self.source}: record {self.number}"

    def value(self, name: str) -> Any:
        """The column's value; it must be there and not null."""
        column = self.settings.column(name)
        if self.record.get(column) is None:
            columns_there = ", ".join(shown(str(key))[1:-1] for key in list(self.record)[:MOST_NAMED]) or "none"
            columns_there += f", ... {len(self.record) - MOST_NAMED} more" if len(self.record) > MOST_NAMED else ""
            what_is_there = "null in" if column in self.record else "no"
            raise UsageError(
                f"{self} has {what_is_there} column {column!r}, which format {self.settings.format!r} needs (columns there: "
                f"{columns_there}; data.{name}_field names another)"
            )
        return self.record[column]

    def text(self, name: str, optional: bool = False) -> str:
        """The column as text; absent or null is "" where it is optional."""
        column = self.settings.column(name)
        if optional and self.record.get(column) is None:
            return ""
        return self._as_text(self.value(name), column)

    def texts(self) -> dict[str, str]:
        """Every column that is text or a finite number, by its own name (for `data.template`)."""
        printable = {k: v for k, v in self.record.items() if isinstance(v, str | int | float)}
        return {k: self._as_text(v, k) for k, v in printable.items() if not isinstance(v, float) or math.isfinite(v)}

    def _as_text(self, value: Any, column: str) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{self} has {value} in column {column!r}; accepted: text, or a number that is finite")
        if not isinstance(value, str | int | float):
            raise UsageError(f"{self} has {type(value).__name__} in column {column!r}; accepted: text")
        if isinstance(value, bool):
            return str(value).lower()  # as JSON writes it
        return value if isinstance(value, str) else str(value)
