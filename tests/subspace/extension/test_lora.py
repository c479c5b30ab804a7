"""LoRA against its golden numbers, its initial values, and dropout."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, resolve
from tests.subspace.golden import BIAS, X2, A, B, G, W, X, golden_layer, layer


def test_forward_is_the_golden_one() -> None:
    for transposed in (False, True):
        module = golden_layer("lora", transposed=transposed)
        torch.testing.assert_close(module(X), torch.tensor([[6.5, 8, 0]]))
        torch.testing.assert_close(module(X2), torch.tensor([[-6.5, 6, 4]]))
        torch.testing.assert_close(golden_layer("lora", bias=True)(X), torch.tensor([[6.5, 8, 0]]) + BIAS)


def test_the_update_is_the_golden_one() -> None:
    expected = torch.tensor([[2.0, 0, -2, 4], [0, 4, 4, 0], [-2, 2, 4, -4]])
    torch.testing.assert_close(golden_layer("lora").merged(W) - W, expected)


def test_gradients_are_those_of_the_formula() -> None:
    module = golden_layer("lora")
    x = X.clone().requires_grad_(True)
    module(x).backward(G)
    torch.testing.assert_close(module.lora_A.grad, 2 * B.t() @ G.t() @ X)
    torch.testing.assert_close(module.lora_B.grad, 2 * G.t() @ (X @ A.t()))
    torch.testing.assert_close(x.grad, G @ (W + 2 * B @ A))


def test_fourteen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("lora", rank=2).trainables().values()) == 14


def test_alpha_is_twice_the_rank_where_it_is_not_given() -> None:
    assert layer("lora", rank=2).scale == 2.0
    assert layer("lora", rank=2, alpha=3).scale == 1.5


def test_a_is_kaiming_uniform_and_b_zero() -> None:
    module = layer("lora", rank=3)
    assert not module.lora_B.any()
    assert module.lora_A.abs().max() <= 0.5 and module.lora_A.std() > 0.1  # 1 / sqrt(4)


@pytest.mark.parametrize(("init", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
def test_a_is_drawn_as_wide_as_pefts(init: str, theirs: bool | str) -> None:
    """Of 12,000 values: their standard deviation, and the largest, tell one distribution from another."""
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=theirs)  # type: ignore[arg-type]
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(3000, 8)), config).base_model.model[0]
    expected = wrapped.lora_A["default"].weight.detach()
    resolved = resolve(SubspaceConfig(method="lora", rank=4, options={"init": init}))
    part = resolved.method.build(pack(torch.zeros(8, 3000), "fp32"), resolved.settings, torch.Generator(), None)
    torch.testing.assert_close(part.lora_A.std(), expected.std(), rtol=0.05, atol=0)
    torch.testing.assert_close(part.lora_A.abs().max(), expected.abs().max(), rtol=0.3, atol=0)


def dropped(p: float = 0.5) -> torch.nn.Module:
    return golden_layer("lora", dropout=p)


def test_dropout_acts_on_the_adapters_branch_alone_and_in_training_alone() -> None:
    module = dropped()
    torch.testing.assert_close(module.eval()(X), torch.tensor([[6.5, 8, 0]]))
    module.train()
    frozen = X @ W.t()
    seen = {tuple(module(X).detach().round(decimals=4)[0].tolist()) for _ in range(200)}
    allowed = set()
    for mask in range(16):
        kept = torch.tensor([[(mask >> i & 1) * 2.0 for i in range(4)]])
        allowed.add(tuple((frozen + 2 * (kept * X) @ A.t() @ B.t()).round(decimals=4)[0].tolist()))
    assert seen <= allowed and len(seen) > 8


def test_backward_uses_the_mask_of_forward() -> None:
    """y is linear in x for a fixed mask, so y = (dy/dx) x must hold to the last digit of the same draw."""
    module = dropped().train()
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(1, 4, requires_grad=True)
        y = module(x)
        rows = [torch.autograd.grad(y[0, i], x, retain_graph=True)[0] for i in range(3)]
        torch.testing.assert_close(torch.cat(rows) @ x.detach()[0], y.detach()[0])
        grad_b = torch.autograd.grad(y[0, 0], module.lora_B)[0]
        # The first output is frozen part + 2 B[0] . (A D(x)), and dy/dB[0] = 2 A D(x).
        torch.testing.assert_close((x @ W.t())[0, 0] + grad_b[0] @ module.lora_B[0], y[0, 0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_draws_the_same_mask_when_checkpointing_recomputes(reentrant: bool) -> None:
    module = dropped().train()
    for seed in range(10):
        x = torch.randn(6, 4, requires_grad=True)
        torch.manual_seed(seed)
        plain = torch.autograd.grad(module(x).square().sum(), [x, module.lora_A, module.lora_B])
        torch.manual_seed(seed)
        y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)
        y.square().sum().backward()
        for expected, actual in zip(plain, [x.grad, module.lora_A.grad, module.lora_B.grad], strict=True):
            torch.testing.assert_close(actual, expected)
        module.zero_grad()


def test_dropout_is_a_function_of_the_seed_alone() -> None:
    module, other = dropped().train(), dropped().train()
    torch.manual_seed(5)
    first = module(X)
    torch.randn(100)
    torch.manual_seed(5)
    assert torch.equal(first, other(X))
