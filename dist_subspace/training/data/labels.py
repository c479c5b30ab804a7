"""Class ids of a classification data set."""

from __future__ import annotations

import numpy as np

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.store import Columns
from dist_subspace.training.data.values import shown

MOST_CLASSES = 100_000
LONGEST_NUMBER = 18  # digits; a longer one is a code


def label_of(row: Row) -> str | int:
    """A record's label: text as it stands, or an integer, which a table with nulls in that column writes as 3.0.

    Raises:
        UsageError: for one that is blank or of another type.
    """
    label = row.value("label")
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, float):
        raise UsageError(
            f"{row} has the label {label}: a number that is predicted (regression) is not trained; accepted: text or an integer, "
            "for example the number rounded to classes"
        )
    if not isinstance(label, str | int):
        raise UsageError(f"{row} has {type(label).__name__} as label; accepted: text or an integer")
    if isinstance(label, str) and not label.strip():
        raise UsageError(f"{row} has a blank label; accepted: text or an integer")
    return label


def label_names(columns: list[Columns]) -> list[str]:
    """The class names of the training data, in the order of their ids.

    Integers from 0 on are the ids as they stand (also when a CSV gives them as text); anything else is sorted. Where one
    begins with a zero that no number has (01), all are codes, which are text: 01 and 1 are two classes. The integer 1 and the
    text "1" are one: files of different kinds write the same label so.
    """
    labels = {label for part in columns for label in part.labels}
    numbers = {_as_integer(label) for label in labels}
    if None in numbers or min(n for n in numbers if n is not None) < 0:
        return sorted({str(label) for label in labels})
    largest = max(n for n in numbers if n is not None)
    if largest >= MOST_CLASSES:
        raise UsageError(f"the largest label is {largest}; accepted: class ids below {MOST_CLASSES}, or text")
    return [str(i) for i in range(largest + 1)]


def class_ids(columns: Columns, names: list[str], source: str) -> np.ndarray:
    """(labels of the columns,) int64: the class id of each label in the columns' own list."""
    id_of_name = {name: i for i, name in enumerate(names)}
    ids = []
    for label in columns.labels:
        name = str(label)
        if name not in id_of_name:
            known = ", ".join(shown(known)[1:-1] for known in names[:8]) + (", ..." if len(names) > 8 else "")
            raise UsageError(f"{source} has the label {shown(label)}, which the training data has not (there: {known})")
        ids.append(id_of_name[name])
    return np.asarray(ids, np.int64)


def _as_integer(label: str | int) -> int | None:
    """The label as an integer, where it is one or the text that `str` makes of one."""
    if isinstance(label, int):
        return label
    is_short_number = label.isascii() and label.isdigit() and len(label) <= LONGEST_NUMBER
    return int(label) if is_short_number and str(int(label)) == label else None
