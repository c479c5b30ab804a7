"""LieRA: golden numbers of both forms, the product form with r + 1 terms, dropout, and special cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_subspace.storage import operator, pack, storages
from dist_subspace.subspace import LowRankForm, SubspaceConfig, SubspaceLinear, resolve
from dist_subspace.subspace.blocks.dropout import Dropout
from tests.subspace.golden import BIAS, A, B, W, X, give, layer

FIRST, EXPONENTIAL = torch.tensor([[6.5, 24, -2]]), torch.tensor([[40.0771872144, 271.9907501657, 54.7701165942]])
each_form = pytest.mark.parametrize("form", ["first-order", "exp"])


def golden(form: str = "first-order", **config: Any) -> SubspaceLinear:
    return give(layer("liera", rank=2, alpha=4.0, options={"form": form}, **config), lora_A=A, lora_B=B)


def with_matrix(weight: torch.Tensor, storage: str, form: str, **layout: bool) -> Any:
    resolved = resolve(SubspaceConfig("liera", rank=3, options={"form": form}))
    module = resolved.method.build(pack(weight, storage, **layout), resolved.settings, torch.Generator(), None)
    return give(module, lora_B=0.3 * torch.randn(len(module.lora_B), 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("form", "expected"), [("first-order", FIRST), ("exp", EXPONENTIAL)])
def test_forward_is_the_golden_one(form: str, expected: torch.Tensor, transposed: bool) -> None:
    torch.testing.assert_close(golden(form, transposed=transposed)(X), expected)
    torch.testing.assert_close(golden(form, bias=True)(X), expected + BIAS)


def test_the_merged_matrix_is_the_golden_one() -> None:
    expected = torch.tensor([[6.0, -1, 0, 5], [0, 15, 5, -2], [-1, 0, -5, -12]])
    torch.testing.assert_close(golden().merged(W), expected)
    torch.testing.assert_close(X @ golden("exp").merged(W).t(), EXPONENTIAL)


def test_it_is_the_sum_of_r_plus_one_products() -> None:
    terms = [B[:, j] * (A[j] * X @ W.t()) for j in range(2)]
    torch.testing.assert_close(torch.cat(terms), torch.tensor([[3.0, 0, -4], [0, 10, 1]]))
    torch.testing.assert_close(golden()(X), X @ W.t() + 2 * sum(terms))


@each_form
@pytest.mark.parametrize("storage", sorted(storages()))
@pytest.mark.parametrize("transposed", [False, True])
def test_many_tiles_are_the_dense_formula(
    form: str, storage: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "TILE", 64)
    module = with_matrix(torch.randn(19, 26), storage, form, transposed=transposed)
    x = torch.randn(2, 4, module.in_features, requires_grad=True)
    dense = module.base.dense()
    exponent = module.scale * module.lora_B @ module.lora_A
    expected = x @ (dense * (exponent.exp() if form == "exp" else 1 + exponent)).t()
    actual = module(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    inputs, g = [x, module.lora_A, module.lora_B], torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad(actual, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@each_form
def test_dropout_acts_on_the_change_alone(form: str) -> None:
    module = golden(form, dropout=0.5).train()
    for seed in range(4):
        x = torch.randn(5, 4, requires_grad=True)
        torch.manual_seed(seed)
        y = module(x)
        torch.manual_seed(seed)
        expected = x @ W.t() + Dropout(0.5, x)(x) @ (module.merged(W) - W).t()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
        inputs, g = [x, module.lora_A, module.lora_B], torch.randn_like(y)
        for mine, reference in zip(
            torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
        ):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(module.eval()(X), FIRST if form == "first-order" else EXPONENTIAL)


def test_on_a_matrix_of_ones_it_is_lora() -> None:
    module, lora = with_matrix(torch.ones(3, 4), "fp32", "first-order"), layer("lora", rank=3)
    give(lora, lora_A=module.lora_A.data, lora_B=module.lora_B.data)
    torch.testing.assert_close(module(X) - X @ torch.ones(4, 3), lora(X) - X @ W.t())


@each_form
def test_zeros_of_the_matrix_stay(form: str) -> None:
    assert torch.equal(golden(form).merged(W) == 0, W == 0)


def test_its_update_is_no_pair_of_factors() -> None:
    assert not isinstance(golden(), LowRankForm)


def test_fourteen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("liera", rank=2).trainables().values()) == 14
