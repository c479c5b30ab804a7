"""Matrix pattern constraints (arXiv 2407.05417, section IV.B, eqs 23-26; docs/methods.md, "Matrix pattern constraints").

For one layer, with `A (r, d_in)`, `B (d_out, r)` and `off(M) = M - diag(diag M)`:

    MPC_o   ‖A Aᵀ - I‖² + ‖Bᵀ B - I‖²       MPC_d   ‖A Aᵀ - I‖² + ‖off(Bᵀ B)‖²       MPC_n   y = W x + γ B σ(A x)

`power` 2 takes the squared Frobenius norms, as the paper does, 1 the norms, as AdaLoRA's code does. `reduction` mean is over
layers (power 2) or over factor matrices (power 1); sum adds them up.

The penalty's gradient enters through an identity on the layer's output. A penalty summed up after the model's forward would
read empty tensors under ZeRO-3, and one summed up inside it would lose its graph under activation checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.options import Option, choice
from dist_subspace.subspace.core.accumulation import Accumulation
from dist_subspace.torch_internals import TensorFunction

CONSTRAINTS = ("none", "mpc_o", "mpc_d", "mpc_n")
PENALTIES = ("mpc_o", "mpc_d")


@dataclass(frozen=True)
class Constraint:
    """kind: mpc_o, mpc_d or mpc_n; weight: λ of the penalty in the training loss."""

    kind: str
    weight: float
    power: int = 2
    reduction: str = "mean"

    @property
    def nonlinear(self) -> bool:
        return self.kind == "mpc_n"


def constraint_options(accepted: tuple[str, ...], power: int = 2) -> dict[str, Option]:
    """The options that come with the constraints a method accepts."""
    options: dict[str, Option] = {}
    if any(kind in accepted for kind in PENALTIES):
        options["power"] = choice(power, "of the norms in the penalty: squared, or as they are", 3 - power)
        options["reduction"] = choice("mean", "of the penalty over layers", "sum")
    if "mpc_n" in accepted:
        options["activation"] = choice("relu", "between the factors under mpc_n", "gelu", "silu", "tanh")
    return options


@dataclass
class Penalties:
    """The penalties of all layers of a model: how they are averaged, weighted, and what they came to in the last backward."""

    constraint: Constraint
    accumulation: Accumulation
    matrices: int = 0
    layers: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    counting: bool = False

    def watch(self, model: nn.Module) -> None:
        """Count how often each forward of the model calls a layer: blocks that share a layer share its one penalty. Calls by
        which activation checkpointing repeats a forward come after it, and do not count."""

        def begin(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled():  # a reference's forward may lie between this one's and its backward
                self.calls, self.counting = {}, True

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.counting = False

        model.register_forward_pre_hook(begin)
        model.register_forward_hook(end)

    def called(self, name: str) -> None:
        if self.counting:
            self.calls[name] = self.calls.get(name, 0) + 1

    @property
    def factor(self) -> float:
        """What a term is multiplied by: λ, and 1 / (layers, or factor matrices)."""
        if self.constraint.reduction == "sum":
            return self.constraint.weight
        return self.constraint.weight / max(1, self.layers if self.constraint.power == 2 else self.matrices)

    def total(self) -> float:
        """The weighted penalty, as it is part of the training loss."""
        return float(sum(self.values.values())) if self.values else 0.0


class Penalty:
    """One layer's penalty: called with the layer's output and its factors, it returns the output."""

    def __init__(self, name: str, penalties: Penalties) -> None:
        self.name, self.penalties = name, penalties

    def __call__(self, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        self.penalties.called(self.name)
        if not torch.is_grad_enabled():
            return y
        return _Inject.apply(y, a, b, self)

    def gradients(self, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """∂(weighted penalty)/∂A and /∂B of the weighted penalty, float32; notes its value."""
        constraint = self.penalties.constraint
        value_a, grad_a = _term(None if a is None else a.float().t(), constraint.power, diagonal_free=False)
        value_b, grad_b = _term(None if b is None else b.float(), constraint.power, constraint.kind == "mpc_d")
        factor = self.penalties.factor
        self.penalties.values[self.name] = factor * (value_a + value_b)
        return (
            None if grad_a is None else factor * grad_a.t(),
            None if grad_b is None else factor * grad_b,
        )


def penalty_value(a: Tensor | None, b: Tensor | None, constraint: Constraint) -> Tensor:
    """The unweighted penalty of one layer (sum of its two terms)."""
    value_a, _ = _term(None if a is None else a.float().t(), constraint.power, diagonal_free=False)
    value_b, _ = _term(None if b is None else b.float(), constraint.power, constraint.kind == "mpc_d")
    return torch.as_tensor(value_a + value_b)


def _term(columns: Tensor | None, power: int, diagonal_free: bool) -> tuple[Any, Tensor | None]:
    """‖MᵀM - I‖ (or of its off-diagonal) to the given power, and its gradient, for `M (d, r)`."""
    if columns is None:
        return 0.0, None
    gram = columns.t() @ columns
    if diagonal_free:
        residual = gram - torch.diag(gram.diagonal())
    else:
        residual = gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    squared = residual.square().sum()
    gradient = 4 * columns @ residual
    if power == 2:
        return squared, gradient
    norm = squared.sqrt()
    return norm, torch.where(norm > 0, gradient / (2 * norm).clamp(min=1e-30), torch.zeros_like(gradient))


class _Inject(TensorFunction):
    """The identity on y; in backward the penalty's gradient, scaled as the loss is, goes to the factors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, a: Tensor | None, b: Tensor | None, penalty: Penalty) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.penalty = penalty
        return y.clone()  # a view of a custom function could not be changed in place by the model

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        grad_a, grad_b = ctx.penalty.gradients(a, b)
        weight = ctx.penalty.penalties.accumulation.weight / ctx.penalty.penalties.calls.get(ctx.penalty.name, 1)
        return (
            g,
            None if grad_a is None else (weight * grad_a).to(a.dtype),
            None if grad_b is None else (weight * grad_b).to(b.dtype),
            None,
        )
