"""Feature-wise scaling by `1 + δ`, the building block of SSL, SSB and IA3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_subspace.subspace.blocks.sums import summed_product
from dist_subspace.subspace.core.forms import ScalingForm
from dist_subspace.torch_internals import TensorFunction


class Scale(TensorFunction):
    """`y = (1 + δ) ⊙ x` for `x (..., d)` and `δ (d,)`.

    Near one, a bfloat16 step is 2^-8: `1 + δ` would lose what a learning rate of 1e-3 adds. So δ is what is stored, and
    x + δ x what is computed, with δ rounded relative to itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta)
        return torch.addcmul(x, x, delta.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, delta = ctx.saved_tensors
        grad_x = torch.addcmul(g, g, delta.to(g.dtype)) if ctx.needs_input_grad[0] else None
        grad_delta = summed_product(g, x, delta.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_delta


class ScalingLinear(ScalingForm):
    """A method whose trained vectors are deviations from one; its file holds the factors themselves, as the paper has them."""

    def file_tensors(self) -> dict[str, Tensor]:
        return {name: 1 + p.detach().float() for name, p in self.trainables().items()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainables().items():
            parameter.data.copy_(tensors[name].float() - 1)
