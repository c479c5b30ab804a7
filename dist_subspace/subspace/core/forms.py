"""What an update is as mathematics, where that has a name: other programs hold it so, and reports measure it so."""

from __future__ import annotations

from torch import Tensor

from dist_subspace.subspace.core.linear import SubspaceLinear


class LowRankForm(SubspaceLinear):
    """A method whose update is a product of two thin matrices."""

    def low_rank_form(self) -> tuple[Tensor, Tensor] | None:
        """`(A (r', d_in), B (d_out, r'))`, float32, with `ΔW = B A` exactly; None where a nonlinearity stands between them."""
        raise NotImplementedError


class ScalingForm(SubspaceLinear):
    """A method that scales the layer's inputs, its outputs, or both."""

    def scaling_form(self) -> tuple[Tensor | None, Tensor | None]:
        """`(s (d_in), l (d_out))`, float32, with `W' = diag(l) W diag(s)` exactly (None for all ones)."""
        raise NotImplementedError


class RotationForm(SubspaceLinear):
    """A method that turns the layer's inputs."""

    def rotation(self) -> Tensor:
        """`R - I`, block by block `(blocks, b, b)`, of the block-diagonal rotation R or of its inverse."""
        raise NotImplementedError
