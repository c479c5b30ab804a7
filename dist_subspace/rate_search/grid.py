"""Which rates are tried, and for how many steps: a geometric grid, and the rungs of successive halving (Jamieson and Talwalkar,
arXiv 1502.07943)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

from dist_subspace.errors import UsageError

RATES = 7  # of a grid: three half decades to each side of its centre
FACTOR = math.sqrt(10.0)  # from one rate of a grid to the next
STEPS = 80  # of a rate that reaches the last rung
WARMUP = 0.1  # of these steps: over before the first rung is, where there are no more than eight rates
EXTENSIONS = 4  # rates beyond the ends of a grid, at most: another two decades


def grid(centre: float) -> tuple[float, ...]:
    """Rates around `centre`, ascending, in two figures each."""
    half = RATES // 2
    return tuple(_rounded(centre * FACTOR**k) for k in range(-half, half + 1))


def beyond(rates: Sequence[float], upwards: bool) -> float:
    """The next rate on one side of all that were tried."""
    return _rounded(max(rates) * FACTOR if upwards else min(rates) / FACTOR)


def rungs(count: int, steps: int) -> list[int]:
    """After how many steps the rates are compared: the last is `steps`, each other one half of the next.

    Raises:
        UsageError: fewer steps than there are halvings of so many rates.
    """
    number = max(1, math.ceil(math.log2(count)))
    least = 2 ** (number - 1)
    if steps < least:
        raise UsageError(
            f"--steps is {steps} for {count} rates, whose number is halved {number - 1} times; accepted: at least {least}, or "
            "fewer --rates"
        )
    return [steps // 2**halvings for halvings in reversed(range(number))]


def kept(count: int) -> int:
    """How many of so many rates go on to the next rung."""
    return max(2, math.ceil(count / 2))


def rate_text(rate: float) -> str:
    """The rate as YAML reads it: 3.0e-3."""
    return numpy.format_float_scientific(rate, trim="0", exp_digits=1)


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")
