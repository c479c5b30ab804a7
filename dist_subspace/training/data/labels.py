"""Class ids of a classification data set."""

from __future__ import annotations

import numpy as np

from dist_subspace.errors import UsageError
from dist_subspace.training.data.store import Columns

MOST_CLASSES = 100_000


def label_names(columns: list[Columns]) -> list[str]:
    """The class names of the training data, in the order of their ids.

    Integers from 0 on are the ids as they stand (also when a CSV gives them as text); anything else is sorted.
    """
    found = {label for part in columns for label in part.labels}
    numbers = {_number(label) for label in found}
    if None in numbers or min(n for n in numbers if n is not None) < 0:
        return sorted({str(label) for label in found})
    most = max(n for n in numbers if n is not None)
    if most >= MOST_CLASSES:
        raise UsageError(f"the largest label is {most}; accepted: class ids below {MOST_CLASSES}, or text")
    return [str(i) for i in range(most + 1)]


def class_ids(columns: Columns, names: list[str], source: str) -> np.ndarray:
    """(labels of the columns,) int64: the class id of each label in the columns' own list."""
    place = {name: i for i, name in enumerate(names)}
    ids = []
    for label in columns.labels:
        number = _number(label)
        name = str(label) if number is None else str(number)
        if name not in place:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UsageError(f"{source} has the label {label!r}, which the training data has not (there: {known})")
        ids.append(place[name])
    return np.asarray(ids, np.int64)


def _number(label: str | int) -> int | None:
    if isinstance(label, int):
        return label
    return int(label) if label.isascii() and label.isdigit() else None
