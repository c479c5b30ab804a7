"""The macro F1 by its definition."""

from __future__ import annotations


def macro_f1(true: list[int], predicted: list[int]) -> float:
    """The definition: the mean over the classes that occur of 2 P R / (P + R), 0 where that is no number."""
    values = []
    for kind in sorted({*true, *predicted}):
        hits = sum(t == p == kind for t, p in zip(true, predicted))
        precision, recall = hits / max(1, predicted.count(kind)), hits / max(1, true.count(kind))
        values.append(0.0 if hits == 0 else 2 * precision * recall / (precision + recall))
    return sum(values) / len(values)
