"""Learning rates of their own."""

from __future__ import annotations

from typing import ClassVar

from dist_subspace.subspace.core.part import SubspacePart


class LearningRateRatio(SubspacePart):
    """A method with the option `lr_ratio`, which multiplies the learning rate of some of its parameters (LoRA+)."""

    left_factors: ClassVar[tuple[str, ...]]
