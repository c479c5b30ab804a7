"""The samples of a run as one numbered table over the columns of its sources."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dist_subspace.errors import UsageError
from dist_subspace.training.data.samples import IGNORED
from dist_subspace.training.data.store import Columns

HELD_OUT = 0xE7A1  # tells the draw of the held-out samples apart from the draws of the order


@dataclass(frozen=True)
class Part:
    """Some samples of one source, and how often they come in an epoch."""

    columns: Columns
    rows: np.ndarray
    """Which samples of the columns, ascending."""
    weight: float = 1.0
    class_ids: np.ndarray | None = None
    """For classification: class id by place in the columns' own list of labels."""


@dataclass(frozen=True)
class TokenTable:
    """Samples 0 to len - 1 of all parts, one part after the other."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def classification(self) -> bool:
        return self.parts[0].class_ids is not None

    @property
    def shares(self) -> list[tuple[int, float]]:
        """(number of samples, weight) of each part, in the order in which the samples are numbered."""
        return [(len(part.rows), part.weight) for part in self.parts]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each sample."""
        return np.concatenate([part.columns.lengths[part.rows] for part in self.parts])

    @cached_property
    def target_counts(self) -> np.ndarray:
        """(n,) targets of each sample: labels that are not -100, position 0 apart (one each for classification)."""
        return np.concatenate([part.columns.targets[part.rows] for part in self.parts])

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of sample i, int64. Labels are -100 off target, at position 0 always; or one class id (1,)."""
        part, row = self._place(i)
        span = slice(part.columns.offsets[row], part.columns.offsets[row + 1])
        ids = part.columns.ids[span].astype(np.int64)
        if part.class_ids is not None:
            return ids, part.class_ids[part.columns.classes[row]].reshape(1)
        labels = np.where(part.columns.trained[span], ids, IGNORED)
        labels[0] = IGNORED
        return ids, labels

    def label(self, i: int) -> str | int:
        """The label of sample i as its record has it, where the format has labels."""
        part, row = self._place(i)
        return part.columns.labels[part.columns.classes[row]]

    def _place(self, i: int) -> tuple[Part, int]:
        """The part that sample i is of, and its row in that part's columns."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        part = self.parts[number]
        return part, int(part.rows[i - (self._ends[number - 1] if number else 0)])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part.rows) for part in self.parts])


def whole_table(columns: list[Columns], weights: list[float], class_ids: list[np.ndarray | None]) -> TokenTable:
    return TokenTable(
        tuple(Part(c, np.arange(len(c)), weight, ids) for c, weight, ids in zip(columns, weights, class_ids))
    )


def hold_out(table: TokenTable, fraction: float, seed: int, by_sample: list[bool]) -> tuple[TokenTable, TokenTable]:
    """(training, evaluation): a fraction of the records, drawn by the seed, is never trained on.

    All samples of a record go to the same side. `by_sample` says for each part that it is one document, whose pieces
    are drawn one by one.
    """
    keys = [
        np.arange(len(part.rows)) if by_one else part.columns.records[part.rows]
        for part, by_one in zip(table.parts, by_sample)
    ]
    groups = np.concatenate([np.stack([np.full(len(key), number), key], axis=1) for number, key in enumerate(keys)])
    _, group = np.unique(groups, axis=0, return_inverse=True)
    group = group.reshape(-1)
    count = int(group.max()) + 1
    held_out_count = max(1, round(fraction * count))
    if held_out_count >= count:
        raise UsageError(f"data.eval is {fraction}, which leaves nothing to train on of {count} records")
    is_held_out = np.zeros(count, bool)
    is_held_out[np.random.default_rng([seed, HELD_OUT]).permutation(count)[:held_out_count]] = True
    return _selected(table, ~is_held_out[group]), replace_weights(_selected(table, is_held_out[group]))


def drawn(table: TokenTable, count: int, seed: int) -> TokenTable:
    """`count` samples, drawn by the seed; all of a table that has no more."""
    if len(table) <= count:
        return table
    chosen = np.zeros(len(table), bool)
    chosen[np.random.default_rng([seed, HELD_OUT]).permutation(len(table))[:count]] = True
    return _selected(table, chosen)


def replace_weights(table: TokenTable) -> TokenTable:
    """The same samples, each counted once (evaluation knows no weights)."""
    return TokenTable(tuple(replace(part, weight=1.0) for part in table.parts))


def _selected(table: TokenTable, mask: np.ndarray) -> TokenTable:
    parts, start = [], 0
    for part in table.parts:
        kept = mask[start : start + len(part.rows)]
        start += len(part.rows)
        if kept.any():
            parts.append(replace(part, rows=part.rows[kept]))
    return TokenTable(tuple(parts))
