"""Methods that change the bias of their layer. The others leave the frozen one as it is."""

from __future__ import annotations

from torch import Tensor

from dist_subspace.subspace.core.linear import SubspaceLinear


class ScalesBias(SubspaceLinear):
    """A method that scales the layer's output may scale its bias too."""

    def scaled_bias(self, bias: Tensor) -> Tensor:
        """The bias that is added in the place of the frozen one."""
        raise NotImplementedError

    def with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.scaled_bias(self.bias).to(y.dtype)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self.scaled_bias(bias)


class AddsBias(SubspaceLinear):
    """A method that brings a bias along, beside the frozen one."""

    def added_bias(self) -> Tensor:
        """`(d_out,)`."""
        raise NotImplementedError

    def with_bias(self, y: Tensor) -> Tensor:
        return super().with_bias(y) + self.added_bias().to(y.dtype)

    def merged_bias(self, bias: Tensor | None) -> Tensor:
        return self.added_bias() if bias is None else bias + self.added_bias().float()
