"""What cutting to `max_length` did to the training data: counted while it is tokenised, said before the first step."""

from __future__ import annotations

from dataclasses import dataclass


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
