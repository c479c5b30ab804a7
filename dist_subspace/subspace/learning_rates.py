"""The learning rate that a configuration's method trains at on a model of a given width: what `learning_rate: auto` becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_subspace.subspace.config import Resolved, resolve
from dist_subspace.subspace.core.learning_rate import WIDTHS, LearningRate
from dist_subspace.subspace.core.spec import Settings, SubspaceConfig

FAR = 10.0  # times the method's own rate, up or down: from there on a run is likely to learn nothing, or to diverge


@dataclass(frozen=True)
class SuggestedRate:
    """rate: for AdamW; lowest, highest: the range in which it pays to search; why: where the rate comes from, in words."""

    rate: float
    lowest: float
    highest: float
    why: str

    def times(self, share: float, because: str) -> SuggestedRate:
        """The same for a training that needs another rate."""
        rate = _rounded(self.rate * share)
        why = f"{self.why}, times {share:g} {because}"
        return SuggestedRate(rate, _rounded(rate / FAR), _rounded(rate * FAR), why)

    def is_far(self, rate: float) -> bool:
        """Whether a given rate lies outside of the range."""
        return not self.lowest <= rate <= self.highest


def suggested_rate(config: SubspaceConfig, width: int) -> SuggestedRate:
    """The rate of a configuration with what it says about rank, alpha and options.

    Arguments:
        width: inputs of the adapted matrices, the most frequent number.

    Raises:
        UsageError: as `resolve`.
    """
    resolved = resolve(config)
    declared = resolved.info.learning_rate
    share = _own_effect(resolved) / _effect(declared, resolved.settings)
    rate = _rounded(declared.at(width) * share)
    return SuggestedRate(rate, _rounded(rate / FAR), _rounded(rate * FAR), _why(resolved, width, share))


def _effect(declared: LearningRate, settings: Settings) -> float:
    """How far a step goes; 1 where an option switches the method off."""
    effect = declared.effect(settings)
    return effect if effect > 0 else 1.0


def _own_effect(resolved: Resolved) -> float:
    """The effect with the method's own settings, at which its rates are declared."""
    own = resolve(SubspaceConfig(method=resolved.info.name))
    return _effect(own.info.learning_rate, own.settings)


def _why(resolved: Resolved, width: int, share: float) -> str:
    """`the rate of method ssb for 1,024 inputs (between ...)`."""
    info = resolved.info
    scaled = (
        "" if math.isclose(share, 1) else f", times {share:.2g} because {info.learning_rate.effect_text} is not its own"
    )
    return f"the rate of method {info.name} for {width:,} inputs{scaled} ({_origin(info.learning_rate, width)})"


def _origin(declared: LearningRate, width: int) -> str:
    narrow, middle, wide = WIDTHS
    if width <= middle:
        return f"{declared.narrow:g} for {narrow}, {declared.middle:g} for {middle}: docs/methods.md, Learning rates"
    place = "between" if width < wide else "beyond" if width > wide else "of"
    return f"{place} {declared.middle:g} for {middle} and {declared.wide:g} for {wide:,}, {declared.source}"


def _rounded(rate: float) -> float:
    """Two digits: more are not known."""
    return float(f"{rate:.1e}")
