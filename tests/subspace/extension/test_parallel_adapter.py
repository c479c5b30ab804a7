"""Parallel adapter: golden numbers, its strength, dropout after the activation, and what it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.subspace import LowRankForm, SubspaceConfig, resolve
from tests.subspace.golden import X2, A, B, G, W, X, give, layer


def adapter(**config: object) -> torch.nn.Module:
    return give(layer("parallel-adapter", rank=2, **config), lora_A=A, lora_B=B)


def formula(x: Tensor, a: Tensor, b: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    return x @ W.t() + strength * torch.relu(x @ a.t()) @ b.t()


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    module = adapter(transposed=transposed)
    torch.testing.assert_close(module(X2), torch.tensor([[-4.5, 4, 1]]))
    torch.testing.assert_close(module(X), torch.tensor([[3.5, 6, 2]]))  # Wx + BAx: both of Ax are positive


def test_gradients_are_those_of_the_formula() -> None:
    module = adapter(options={"scale": 4.0, "learned_scale": True})
    x = torch.randn(5, 4, requires_grad=True)
    trained = [module.lora_A, module.lora_B, module.adapter_scale]
    actual = torch.autograd.grad(module(x), [x, *trained], G.expand(5, 3))
    expected = torch.autograd.grad(
        formula(x, module.lora_A, module.lora_B, 4 + module.adapter_scale), [x, *trained], G.expand(5, 3)
    )
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_the_strength_is_fixed_or_one_more_trained_number() -> None:
    fixed, learned = adapter(options={"scale": 4.0}), adapter(options={"learned_scale": True})
    assert sum(p.numel() for p in fixed.trainables().values()) == 14
    assert sum(p.numel() for p in learned.trainables().values()) == 15
    torch.testing.assert_close(fixed(X2), formula(X2, A, B, 4.0))
    give(learned, adapter_scale=torch.tensor([0.5]))
    torch.testing.assert_close(learned(X2), formula(X2, A, B, 1.5))


def test_the_file_holds_the_strength_itself() -> None:
    source = give(adapter(options={"scale": 4.0, "learned_scale": True}), adapter_scale=torch.tensor([0.5]))
    assert source.file_tensors()["adapter_scale"].item() == 4.5
    target = layer("parallel-adapter", rank=2, options={"scale": 4.0, "learned_scale": True})
    target.load_file_tensors(source.file_tensors())
    assert torch.equal(target(X2), source(X2))


def test_dropout_acts_on_the_activations_in_training_alone() -> None:
    module = adapter(dropout=0.5)
    torch.testing.assert_close(module.eval()(X), torch.tensor([[3.5, 6, 2]]))
    module.train()
    hidden = torch.relu(X @ A.t())
    seen = {tuple(module(X).detach().round(decimals=4)[0].tolist()) for _ in range(60)}
    masks = [torch.tensor([[2.0 * i, 2.0 * j]]) for i in (0, 1) for j in (0, 1)]
    assert seen == {tuple((X @ W.t() + (mask * hidden) @ B.t()).round(decimals=4)[0].tolist()) for mask in masks}


def test_it_cannot_be_merged_and_cannot_have_what_it_is() -> None:
    with pytest.raises(UsageError, match="method parallel-adapter cannot be merged: its update is no matrix"):
        adapter().merged(W)
    assert not isinstance(adapter(), LowRankForm)
    with pytest.raises(UsageError, match="it has a nonlinearity between its factors already"):
        resolve(SubspaceConfig("parallel-adapter", constraint="mpc_n"))


def test_an_alpha_is_said_to_be_unused() -> None:
    assert resolve(SubspaceConfig("parallel-adapter", alpha=8)).unused == ("alpha",)
    assert resolve(SubspaceConfig("lora", alpha=8)).unused == ()
