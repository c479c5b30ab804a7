"""Cutting to `max_length`, and the counts of what it did to the training data, said before the first step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from dist_subspace.training.data.samples import NOTHING, Outcome, Sample

WHOLE_SHARE = 0.95  # the share of samples that `length_95` keeps whole


@dataclass(frozen=True)
class Cutting:
    """Counts over the samples of the training sources (a held-out part included), before any of them was cut or left out."""

    samples: int
    """Samples that the records gave: those that are trained, those left out and those without a target."""
    cut: int
    """Samples that are trained, but lost tokens of their prompt."""
    left_out: int
    """Samples whose answer alone is longer than `max_length`."""
    without_target: int
    """Samples in which nothing can be trained: an empty text, a conversation without a trained assistant turn."""
    tokens_dropped: int
    """Tokens that the samples counted in `cut` lost, in all."""
    length_95: int
    """The smallest `max_length` that keeps 95% of the samples whole (0 where there are none)."""


def counted(lengths: Sequence[np.ndarray], dropped: Sequence[np.ndarray], kept: Sequence[int]) -> Cutting:
    """The counts over several sources, from each one's (samples,) lengths before cutting (0: without a target), (samples,)
    tokens dropped, and number of samples kept."""
    all_lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    all_dropped = np.concatenate(dropped) if dropped else np.zeros(0, np.int64)
    trained_lengths = np.sort(all_lengths[all_lengths > 0])
    place_95 = int(np.ceil(WHOLE_SHARE * len(trained_lengths))) - 1
    return Cutting(
        samples=len(all_lengths),
        cut=int(np.count_nonzero(all_dropped)),
        left_out=len(trained_lengths) - sum(kept),
        without_target=len(all_lengths) - len(trained_lengths),
        tokens_dropped=int(all_dropped.sum()),
        length_95=int(trained_lengths[place_95]) if len(trained_lengths) else 0,
    )


def leading(ids: Sequence[int] | np.ndarray, special: Collection[int]) -> int:
    """How many special tokens (begin of sequence and the like) stand at the beginning."""
    return next((place for place, i in enumerate(ids) if int(i) not in special), len(ids))


def fit(
    ids: Sequence[int] | np.ndarray, trained: Sequence[bool] | np.ndarray, max_length: int, keep: Sequence[int] = ()
) -> Outcome:
    """The sample cut to `max_length` tokens: what stands left of the first answer loses its left part, behind so many first
    tokens as `keep` says: the first of its numbers that leaves room for the answer, and none where none does.

    Left out where the answer alone (from its first to its last trained token) does not fit, or where nothing is trained.
    """
    flags = np.asarray(trained, bool)
    trained_places = np.flatnonzero(flags)
    if not len(trained_places) or (len(trained_places) == 1 and trained_places[0] == 0):
        return NOTHING
    first, end = int(trained_places[0]), int(trained_places[-1]) + 1
    if len(ids) <= max_length:
        return Outcome(Sample(ids, trained), len(ids))
    if end <= max_length:  # tokens after the last answer teach nothing: they go before any of the prompt
        return Outcome(Sample(ids[:max_length], flags[:max_length]), max_length)
    if end - first > max_length:
        return Outcome(None, end)
    head = next((head for head in (min(count, first) for count in keep) if head + end - first <= max_length), 0)
    start = end - (max_length - head)
    kept_ids = np.concatenate([np.asarray(ids[:head], np.int64), np.asarray(ids[start:end], np.int64)])
    flags = np.concatenate([flags[:head], flags[start:end]])
    return Outcome(Sample(kept_ids, flags) if flags[1:].any() else None, end)
