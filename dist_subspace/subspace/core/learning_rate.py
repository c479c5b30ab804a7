"""The rate at which a method trains: declared where the method is registered, as numbers that were measured or published.

A rate belongs to a width, the number of inputs of the adapted matrices. What one step of AdamW adds to a layer's output is a sum
over these inputs for factors that stand beside the matrix, and is one number for factors that scale what the matrix gives, so
that useful rates lie up to fifty times apart and fall with the width in different ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

# The widths of the three declared rates: stories260K, MiniLM, and a language model of seven to eight billion parameters.
WIDTHS = (64, 384, 4096)


class Factors(Protocol):
    """What a method's `Settings` say of the size of its update."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


def always(settings: Factors) -> float:
    """Of a method whose settings do not change how far a step goes."""
    return 1.0


def by_alpha(settings: Factors) -> float:
    """Of `γ B A` with `γ = α / r`: a step moves each of `r` terms, so what it adds goes with `γ r = α`; of that the root, which
    lies between the rates that were measured for several ranks and those that were published (docs/methods.md)."""
    return math.sqrt(settings.alpha)


def by_rank(settings: Factors) -> float:
    """The same with `γ = 1`."""
    return math.sqrt(settings.rank)


def by_option(name: str) -> Callable[[Factors], float]:
    """Of what an option multiplies, in proportion to it: a step of AdamW is as large whatever its gradient is."""
    return lambda settings: abs(float(settings.options[name]))


@dataclass(frozen=True)
class LearningRate:
    """Rates for AdamW with the method's own settings.

    narrow, middle, wide: at the widths `WIDTHS`; between two of them lies a power law. source: where `wide` comes from. effect:
    how far a step goes, up to a constant, by the settings; the rate is divided by it. effect_text: the same in words.
    """

    narrow: float
    middle: float
    wide: float
    source: str
    effect: Callable[[Factors], float] = always
    effect_text: str = ""

    def by_width(self) -> dict[int, float]:
        """The declared rates."""
        return dict(zip(WIDTHS, (self.narrow, self.middle, self.wide), strict=True))

    def at(self, width: int) -> float:
        """The rate at a width, with the method's own settings. Below the narrowest width it stays as it is there; beyond the
        widest it goes on falling."""
        rates = tuple(self.by_width().values())
        width = max(width, WIDTHS[0])
        low = 0 if width < WIDTHS[1] else 1
        share = math.log(width / WIDTHS[low]) / math.log(WIDTHS[low + 1] / WIDTHS[low])
        return float(rates[low] * (rates[low + 1] / rates[low]) ** share)
