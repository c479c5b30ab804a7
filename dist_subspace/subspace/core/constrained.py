"""Factors that a constraint acts on."""

from __future__ import annotations

from torch import Tensor

from dist_subspace.subspace.core.constraints import Penalty
from dist_subspace.subspace.core.linear import SubspaceLinear


class ConstrainedFactors(SubspaceLinear):
    """A method with a pair of low-rank factors, which a constraint's penalty pulls at (constraints.py)."""

    penalty: Penalty | None = None  # set by attach where there is one

    def constrained_factors(self) -> tuple[Tensor | None, Tensor | None]:
        """`A (r, d_in)` and `B (d_out, r)`; None for one that a constraint must leave alone."""
        raise NotImplementedError

    def transformed(self, x: Tensor) -> Tensor:
        y = super().transformed(x)
        if self.penalty is not None and self.training:
            y = self.penalty(y, *self.constrained_factors())
        return y
