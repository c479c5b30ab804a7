"""A tokenised sample: its token ids, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""The label of a token that is no target."""


@dataclass(frozen=True)
class Sample:
    """Token ids and, for each, whether it is a target. A sample to classify has no target tokens but a `label`.

    Position 0 is never a target: a causal model predicts token t from tokens before t (the usual shift), and in a
    packed row the first token of a sample must not be predicted from the sample before it.

    Two answers to one prompt are one sample of two texts, one behind the other: the second begins where the first run of targets
    ends, which stands at the end of the first.
    """

    ids: Sequence[int] | np.ndarray
    trained: Sequence[bool] | np.ndarray
    label: str | int | None = None
    is_pair: bool = False

    @property
    def targets(self) -> int:
        return int(np.count_nonzero(np.asarray(self.trained[1:], bool)))

    @property
    def longest(self) -> int:
        """Tokens of the longer of its texts."""
        if not self.is_pair:
            return len(self.ids)
        first = first_text(np.asarray(self.trained, bool))
        return max(first, len(self.ids) - first)


def first_text(trained: np.ndarray) -> int:
    """Tokens of the first of a pair's two texts, from `(n,)` bool, which tokens are targets."""
    begin = int(np.argmax(trained))
    behind = trained[begin:]
    return begin + int(np.argmin(behind)) if not behind.all() else len(trained)


@dataclass(frozen=True)
class Outcome:
    """What became of a sample: itself, perhaps cut, or None where it is left out."""

    sample: Sample | None
    length: int
    """Tokens that it had before anything was cut, a pair's longer text; 0 where nothing in it can be trained."""
    remarks: tuple[str, ...] = ()
    """What the run has to say of it: sentences with {count}, the number of records that they hold for."""

    @property
    def dropped(self) -> int:
        """Tokens that a sample lost to `max_length`."""
        return max(0, self.length - self.sample.longest) if self.sample is not None else 0


NOTHING = Outcome(None, 0)
"""A record in which nothing can be trained."""
