"""A tokenised sample: its token ids, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IGNORED = -100
"""The label of a token that is no target."""


@dataclass(frozen=True)
class Sample:
    """Token ids and, for each, whether it is a target. A sample to classify has no target tokens but a `label`.

    Position 0 is never a target: a causal model predicts token t from tokens before t (the usual shift), and in a
    packed row the first token of a sample must not be predicted from the sample before it.
    """

    ids: Sequence[int]
    trained: Sequence[bool]
    label: str | int | None = None

    @property
    def targets(self) -> int:
        return sum(self.trained[1:])


def fit(ids: Sequence[int], trained: Sequence[bool], max_length: int) -> Sample | None:
    """The sample cut to `max_length` tokens: what stands left of the first answer loses its left part.

    None where the answer alone (from its first to its last trained token) does not fit, or where nothing is trained.
    """
    first = next((i for i, is_trained in enumerate(trained) if is_trained), None)
    if first is None:
        return None
    end = len(ids)
    if end > max_length:  # tokens after the last answer teach nothing: they go before any of the prompt
        end = max(max_length, next(i for i in range(end, 0, -1) if trained[i - 1]))
    start = max(0, end - max_length)
    if start > first:
        return None
    sample = Sample(ids[start:end], trained[start:end])
    return sample if sample.targets else None
