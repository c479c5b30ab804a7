"""Updates that are nonlinear between their factors (MPC_n): golden numbers, gradients, dropout before A, no merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceLinear
from dist_subspace.subspace.blocks.dropout import Dropout
from tests.subspace.golden import X2, A, B, W, X, layer

X3 = torch.tensor([[1.0, -3, 0, 1]])
CORES = {
    "lora": {},
    "rslora": {},
    "trilora": {"lora_E": torch.tensor([0.5, -1])},
    "flora": {"lora_G": torch.tensor([[1.0, 0.5], [-1, 2]])},
    "moslora": {"lora_G": torch.tensor([[1.0, 0.5], [-1, 2]])},
    "lora-fa": {},
}
each_method = pytest.mark.parametrize("method", CORES)


def nonlinear(method: str, **config: Any) -> SubspaceLinear:
    """The fixture's layer under MPC_n, γ = 2 (rsLoRA: 4/√2)."""
    module = layer(method, rank=2, alpha=4.0, constraint="mpc_n", **config)
    module.load_file_tensors({"lora_A.weight": A, "lora_B.weight": B, **CORES[method]})
    return module


def formula(module: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`W x + γ B C σ(A x)` under ordinary autograd."""
    core = module.core()
    core = torch.eye(2) if core is None else core.diag() if core.dim() == 1 else core
    activation = getattr(functional, module.settings.options["activation"])
    return x @ W.t() + module.scale * activation(x @ a.t()) @ core.t() @ b.t()


@pytest.mark.parametrize(
    ("method", "expected"), [("lora", [12, -11, -1]), ("trilora", [9, -11, 2]), ("flora", [12, -23, -7])]
)
def test_forward_is_the_golden_one(method: str, expected: list[float]) -> None:
    torch.testing.assert_close(nonlinear(method)(X3), torch.tensor([expected], dtype=torch.float32))
    torch.testing.assert_close(nonlinear("lora")(X2), torch.tensor([[-4.5, 6, 2]]))


@each_method
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_gradients_are_those_of_the_formula(method: str, activation: str) -> None:
    module = nonlinear(method, options={"activation": activation})
    x = torch.randn(2, 5, 4, requires_grad=True)
    g = torch.randn(2, 5, 3)
    trained = list(module.trainables().values())
    actual = torch.autograd.grad(module(x), [x, *trained], g)
    expected = torch.autograd.grad(formula(module, x, module.down(), module.lora_B), [x, *trained], g)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference)


@each_method
def test_such_an_update_is_no_matrix(method: str) -> None:
    module = nonlinear(method)
    with pytest.raises(UsageError, match=f"method {method} with constraint mpc_n cannot be merged"):
        module.merged(W)
    assert module.low_rank_form() is None


@each_method
def test_dropout_comes_before_a(method: str) -> None:
    module = nonlinear(method, dropout=0.5).train()
    for seed in range(5):
        x = torch.randn(6, 4, requires_grad=True)
        torch.manual_seed(seed)
        y = module(x)
        torch.manual_seed(seed)
        dropped = Dropout(0.5, x)(x)
        expected = x @ W.t() + formula(module, dropped, A, B) - dropped @ W.t()
        torch.testing.assert_close(y, expected)
        g = torch.randn(6, 3)
        torch.testing.assert_close(*(torch.autograd.grad(out, x, g)[0] for out in (y, expected)))


def test_the_identity_holds_at_the_start() -> None:
    for method in CORES:
        module = layer(method, rank=2, constraint="mpc_n")
        assert torch.equal(module(X), X @ W.t())
