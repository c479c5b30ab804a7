"""The order of samples, as a function of (seed, epoch) and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ORDER, SHARE = 0x5EED, 0x5A4E  # two draws of one (seed, epoch) that must not be the same numbers


def epoch_size(shares: Sequence[tuple[int, float]]) -> int:
    """Samples in one epoch of parts given as (number of samples, weight); the same for every epoch."""
    return sum(whole * n + extra for n, whole, extra in _repeats(shares))


def sample_order(shares: Sequence[tuple[int, float]] | int, seed: int, epoch: int) -> np.ndarray:
    """(epoch_size,) the sample numbers of an epoch in the order in which they are trained.

    A part of weight w comes in w times: its whole repeats every time, and of the fraction that is left a part of
    the samples, drawn anew by (seed, epoch), without repetition. Weight 0.25 is a fourth of the file, another one in
    each epoch; weight 2.5 is the file twice and half of it once more.
    """
    shares = [(shares, 1.0)] if isinstance(shares, int) else shares
    chosen, start = [], 0
    for number, (n, whole, extra) in enumerate(_repeats(shares)):
        chosen.append(np.tile(np.arange(start, start + n), whole))
        if extra:
            draw = np.random.default_rng([seed, epoch, SHARE, number])
            chosen.append(start + np.sort(draw.permutation(n)[:extra]))
        start += n
    return np.random.default_rng([seed, epoch, ORDER]).permutation(np.concatenate(chosen))


def _repeats(shares: Sequence[tuple[int, float]]) -> list[tuple[int, int, int]]:
    """For each part (samples, whole repeats, samples of the fractional one); a part always gives at least one."""
    counts = []
    for n, weight in shares:
        whole = int(weight)
        extra = round((weight - whole) * n)
        counts.append((n, whole, max(extra, 1) if whole == 0 else extra))
    return counts
