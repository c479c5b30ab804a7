"""SSB against its golden numbers, with and without a scaled bias."""

from __future__ import annotations

import torch

from tests.subspace.golden import BIAS, G, L, S, W, X, give, golden_layer, layer

SCALED = {"options": {"scale_bias": True}}


def test_forward_is_the_golden_one() -> None:
    for transposed in (False, True):
        torch.testing.assert_close(golden_layer("ssb", transposed=transposed)(X), torch.tensor([[3, -2, 0.75]]))
    torch.testing.assert_close(golden_layer("ssb", bias=True)(X), torch.tensor([[3.1, -2.2, 1.05]]))
    torch.testing.assert_close(golden_layer("ssb", bias=True, **SCALED)(X), torch.tensor([[3.2, -1.8, 0.9]]))
    torch.testing.assert_close(golden_layer("ssb", **SCALED)(X), torch.tensor([[3, -2, 0.75]]))


def test_the_merged_matrix_is_the_golden_one() -> None:
    expected = torch.tensor([[6, -1, 0, -2], [0, -1.5, -2, -2], [0.75, 0, -1, -2]])
    torch.testing.assert_close(golden_layer("ssb").merged(W), expected)


def test_gradients_are_the_golden_ones() -> None:
    module = golden_layer("ssb")
    x = X.clone().requires_grad_(True)
    module(x).backward(G)
    torch.testing.assert_close(module.ssb_l.grad, torch.tensor([1.5, -4, 0.75]))
    torch.testing.assert_close(module.ssb_s.grad, torch.tensor([4.25, 8, -1.75, -0.5]))
    torch.testing.assert_close(x.grad, torch.tensor([[6.375, 2, 3.5, 1]]))


def test_a_scaled_bias_adds_its_own_gradient() -> None:
    module = golden_layer("ssb", bias=True, **SCALED)
    module(X).backward(G)
    torch.testing.assert_close(module.ssb_l.grad, torch.tensor([1.5, -4, 0.75]) + G[0] * BIAS)


def test_with_one_side_at_one_it_is_the_other_method() -> None:
    input_side = give(layer("ssb"), ssb_s=S - 1)
    torch.testing.assert_close(input_side(X), golden_layer("ssl")(X))
    output_side = give(layer("ssb"), ssb_l=L - 1)  # the card of (IA)3
    torch.testing.assert_close(output_side(X), torch.tensor([[1.0, -4, 2]]))


def test_seven_values_are_trained_and_the_file_holds_absolute_ones() -> None:
    assert sum(p.numel() for p in layer("ssb").trainables().values()) == 7
    tensors = golden_layer("ssb").file_tensors()
    assert torch.equal(tensors["ssb_s"], S) and torch.equal(tensors["ssb_l"], L)
