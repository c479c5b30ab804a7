"""Low-rank updates: the branch as one autograd function, which takes `x` and `z = W(x)`, saves `x` once and builds no dense
matrix; and the base class of the methods that use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.errors import UsageError
from dist_subspace.subspace.blocks.dropout import Dropout
from dist_subspace.subspace.core.constrained import ConstrainedFactors
from dist_subspace.subspace.core.forms import LowRankForm
from dist_subspace.subspace.core.spec import Settings
from dist_subspace.torch_internals import TensorFunction, reshaped


class LowRankUpdate(TensorFunction):
    """`y = z + γ B (A D(x))` for `x (..., d_in)`, `z (..., d_out)`, `A (r, d_in)`, `B (d_out, r)`.

    The call of the frozen operator stays outside, so that a sharding engine's hooks see it. A and B may be float32 beside
    a 16-bit x: the products run in x's type, their gradients come back in the parameter's own.
    """

    # γ multiplies A, the smallest factor there is, and every product is taken with the r side first: `(r, tokens)` costs
    # half of `(tokens, r)` on CPUs. z is not added to in place: whoever made it, or hooks its module, may still hold it.

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        drop = Dropout(dropout, rows)
        hidden = _scaled(a, scale, x.dtype) @ drop(rows).t()
        ctx.save_for_backward(rows, a, b, hidden)
        ctx.scale, ctx.drop, ctx.shape = scale, drop, x.shape
        flat = z.reshape(-1, z.shape[-1])
        return reshaped(torch.addmm(flat, hidden.t(), b.to(x.dtype).t()), z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, hidden = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, _, _ = ctx.needs_input_grad
        flat = g.reshape(-1, g.shape[-1])
        grad_b = (hidden @ flat).t().to(b.dtype) if needs_b else None
        if not (needs_x or needs_a):
            return g, None, None, grad_b, None, None
        drop = ctx.drop.again()
        grad_hidden = b.to(g.dtype).t() @ flat.t()
        grad_a = (grad_hidden @ drop(rows)).to(a.dtype).mul_(ctx.scale) if needs_a else None
        grad_x = drop(grad_hidden.t() @ _scaled(a, ctx.scale, g.dtype)).view(ctx.shape) if needs_x else None
        return g, grad_x, grad_a, grad_b, None, None


class Down(TensorFunction):
    """`h = A D(x)ᵀ (r, tokens)`: the first half of an update that is nonlinear between its factors. Saves x and A alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, dropout: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, a)
        drop = Dropout(dropout, rows)
        ctx.drop, ctx.shape = drop, x.shape
        return a.to(x.dtype) @ drop(rows).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, a = ctx.saved_tensors
        drop = ctx.drop.again()
        grad_x = drop(g.t() @ a.to(g.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_a = (g @ drop(rows)).to(a.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_a, None


class Up(TensorFunction):
    """`y = z + (B h)ᵀ` for `z (..., d_out)` and `h (r, tokens)`: the second half. Saves h and B alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, hidden: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, b)
        return reshaped(torch.addmm(z.reshape(-1, z.shape[-1]), hidden.t(), b.to(z.dtype).t()), z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, b = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        grad_hidden = b.to(g.dtype).t() @ flat.t() if ctx.needs_input_grad[1] else None
        grad_b = (hidden @ flat).t().to(b.dtype) if ctx.needs_input_grad[2] else None
        return g, grad_hidden, grad_b


def _scaled(a: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`γ A` in the type of the computation; the product is rounded once."""
    return (a * scale).to(dtype)


class LowRankPair(ConstrainedFactors):
    """A trained pair `A (r, d_in)`, `B (d_out, r)`, and a core C between them that a method may add: none, a diagonal `(r,)` or a
    matrix `(r, r)`. What they do to the output is the method's."""

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.scale = self.scaling(settings)
        self.lora_A = nn.Parameter(self.initial_a(settings, generator))
        self.lora_B = nn.Parameter(self.initial_b(settings, generator))

    def initial_a(self, settings: Settings, generator: torch.Generator) -> Tensor:
        return kaiming_uniform(settings.rank, self.in_features, generator)

    def initial_b(self, settings: Settings, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.out_features, settings.rank)

    def scaling(self, settings: Settings) -> float:
        """γ."""
        return settings.alpha / settings.rank

    def down(self) -> Tensor:
        """A, whole where it is gathered."""
        return self.lora_A

    def core(self) -> Tensor | None:
        """C: None for the identity, `(r,)` for a diagonal, `(r, r)` for a matrix."""
        return None

    def delta(self) -> Tensor:
        """`γ B C A`, float32 `(d_out, d_in)`."""
        return self.scale * self.lora_B.float() @ with_core_left(self.core(), self.down().float())

    def constrained_factors(self) -> tuple[Tensor | None, Tensor | None]:
        return self.lora_A, self.lora_B

    @classmethod
    def peft_config(cls, settings: Settings) -> dict[str, Any]:
        return {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "bias": "none"}

    def file_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.weight" if name in _PAIR else name: p.detach() for name, p in self.trainables().items()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainables().items():
            parameter.data.copy_(tensors[f"{name}.weight" if name in _PAIR else name])


class LowRankLinear(LowRankPair, LowRankForm):
    """`y = W x + γ B C (A D(x))`: the base of every method whose update is a product of a few thin matrices.

    Under MPC_n an activation stands before the core: `y = W x + γ B C σ(A D(x))`.
    """

    @property
    def nonlinear(self) -> bool:
        constraint = self.settings.constraint
        return constraint is not None and constraint.nonlinear

    def activation(self) -> Callable[[Tensor], Tensor]:
        return ACTIVATIONS[self.settings.options["activation"]]

    def transform(self, x: Tensor) -> Tensor:
        dropout = self.settings.dropout if self.training else 0.0
        z = self.base(x)
        if self.nonlinear:
            hidden = self.scale * self.activation()(Down.apply(x, self.lora_A, dropout))
            return Up.apply(z, hidden, with_core_right(self.lora_B, self.core()))
        return LowRankUpdate.apply(z, x, with_core_left(self.core(), self.lora_A), self.lora_B, self.scale, dropout)

    def merged(self, weight: Tensor) -> Tensor:
        if self.nonlinear:
            raise UsageError(f"method {self.info.name} with constraint mpc_n cannot be merged: its update is no matrix")
        return weight + self.delta().to(weight.device)

    def low_rank_form(self) -> tuple[Tensor, Tensor] | None:
        if self.nonlinear:
            return None
        return with_core_left(self.core(), self.down()).detach().float(), self.scale * self.lora_B.detach().float()

    def agrees_with_peft(self) -> bool:
        return not self.nonlinear


_PAIR = ("lora_A", "lora_B")  # PEFT keeps these two in linear layers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def with_core_left(core: Tensor | None, a: Tensor) -> Tensor:
    """`C A`; costs r products of A, and no tokens."""
    if core is None:
        return a
    core = core.to(a.dtype)
    return core[:, None] * a if core.dim() == 1 else core @ a


def with_core_right(b: Tensor, core: Tensor | None) -> Tensor:
    """`B C`."""
    if core is None:
        return b
    core = core.to(b.dtype)
    return b * core if core.dim() == 1 else b @ core


def kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """`(rows, columns)` Kaiming-uniform with a = √5: U(-1/√columns, 1/√columns)."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
