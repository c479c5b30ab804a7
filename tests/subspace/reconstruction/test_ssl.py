"""SSL against its golden numbers."""

from __future__ import annotations

import torch

from tests.subspace.golden import BIAS, G, S, W, X, golden_layer, layer


def test_forward_is_the_golden_one() -> None:
    for transposed in (False, True):
        torch.testing.assert_close(golden_layer("ssl", transposed=transposed)(X), torch.tensor([[1.5, 2, 1.5]]))
    torch.testing.assert_close(golden_layer("ssl", bias=True)(X), torch.tensor([[1.5, 2, 1.5]]) + BIAS)


def test_the_merged_matrix_is_the_golden_one() -> None:
    expected = torch.tensor([[3, -0.5, 0, -1], [0, 1.5, 2, 2], [1.5, 0, -2, -4]])
    torch.testing.assert_close(golden_layer("ssl").merged(W), expected)


def test_gradients_are_the_golden_ones() -> None:
    module = golden_layer("ssl")
    x = X.clone().requires_grad_(True)
    module(x).backward(G)
    torch.testing.assert_close(module.ssl_s.grad, torch.tensor([2.5, -14, 2.5, 3.5]))
    torch.testing.assert_close(x.grad, S * (G @ W))


def test_four_values_are_trained_and_the_file_holds_absolute_ones() -> None:
    assert sum(p.numel() for p in layer("ssl").trainables().values()) == 4
    assert torch.equal(golden_layer("ssl").file_tensors()["ssl_s"], S)


def test_a_small_step_is_not_lost_near_one_in_16_bits() -> None:
    module = layer("ssl").to(torch.bfloat16)
    module.ssl_s.data.fill_(1e-3)
    assert (module.ssl_s.float() - 1e-3).abs().max() < 1e-5
