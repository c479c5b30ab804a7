"""Statistics of the frozen matrix: what a method finds out about it, keeps of it, and takes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dist_subspace.subspace.core.factors import FrozenFactor
from dist_subspace.subspace.core.operator import Weight
from dist_subspace.subspace.core.part import SubspacePart


class Decomposes(SubspacePart):
    """A part that takes the frozen matrix apart: before training (`SetupStatistic`), or when its schedule says so."""

    base: Any  # the frozen operator, or the stack of them

    def decompose(self, weight: Weight) -> dict[str, Tensor]:
        """Local, expensive, on one rank: the statistic of the frozen matrix, float32 tensors by name."""
        raise NotImplementedError

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Local, alike on every rank: take what `decompose` found. Frozen factors go into `FrozenFactor` modules or frozen
        parameters (the caller splits them over the ranks), initial values into the trained parameters."""
        raise NotImplementedError


class SetupStatistic(Decomposes):
    """A part that needs its statistic before training."""

    @property
    def setup_statistic(self) -> str:
        """In words what `decompose` finds; `none` where the part's settings need nothing."""
        return self.info.statistic


class KeepsFactors(SetupStatistic):
    """A part whose file holds factors that cannot be had again from the base alone."""

    # Their names, results of `decompose` and attributes of the part. A part whose options decide about it sets its own.
    kept_factors: tuple[str, ...] = ()
    # Of one expert's part: the part of the whole stack, whose parameter holds the factors of all experts, and this one's number.
    stacked: tuple[nn.Module, int] | None = None

    def factor(self, name: str) -> Tensor:
        """A frozen factor that is a parameter, as it is now: to be asked for anew in backward, not to be kept."""
        if self.stacked is None:
            own: Tensor = getattr(self, name)
            return own
        stack, number = self.stacked
        of_all: Tensor = getattr(stack, name)
        return of_all[number]

    def factor_tensors(self) -> dict[str, Tensor]:
        """The frozen factors that a complete adapter holds, by name; whole where their parameters are gathered."""
        held = {name: getattr(self, name) for name in self.kept_factors if getattr(self, name, None) is not None}
        return {name: (f.matrix if isinstance(f, FrozenFactor) else f).detach() for name, f in held.items()}


class FoldsIntoBase(KeepsFactors):
    """A part that can give its base another matrix (a folded residual), and says what the model computed before."""

    @property
    def rebases(self) -> bool:
        """Whether it does so with its settings."""
        raise NotImplementedError

    def rebased(self, factors: Mapping[str, Tensor], weight: Weight) -> Tensor:
        """The matrix `(d_out, d_in)` that the base shall hold in the place of its own, where the part `rebases`."""
        raise NotImplementedError

    def merged_onto_original(self, weight: Tensor) -> Tensor:
        """`W'` from the checkpoint's own `W`, where the base holds something else of it than its rounding."""
        raise NotImplementedError


def rebases(part: object) -> bool:
    """Whether the part gives its base another matrix."""
    return isinstance(part, FoldsIntoBase) and part.rebases


def keeps_factors(part: object) -> bool:
    """Whether an adapter's file is not complete without factors of this part."""
    return isinstance(part, KeepsFactors) and bool(part.kept_factors)
