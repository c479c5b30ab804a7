"""Sums over tokens in 16 bits."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.subspace.blocks.sums import summed_product


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_float16_products_neither_overflow_nor_vanish(size: float) -> None:
    g, x = (torch.full((3, 5, 2), size, dtype=torch.float16) for _ in range(2))
    expected = 15 * g[0, 0].double() * x[0, 0].double()
    torch.testing.assert_close(summed_product(g, x, torch.float32).double(), expected, rtol=1e-6, atol=0)


def test_bfloat16_adds_up_in_float32() -> None:
    g, x = torch.ones(4096, 1, dtype=torch.bfloat16), torch.ones(4096, 1, dtype=torch.bfloat16)
    assert summed_product(g, x, torch.bfloat16).item() == 4096
