"""Sums over tokens: the gradients of vectors that scale features."""

from __future__ import annotations

import torch
from torch import Tensor


def summed_product(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`Σ_t g_t ⊙ x_t` for `g, x (..., d)`: `(d,)` of the given type.

    A sum adds up in float32 within. Of the 16-bit types only float16 could overflow, in a product or in the sum's own type; so
    it is multiplied in float32.
    """
    wide = g.float() if g.dtype == torch.float16 else g
    return (wide * x).reshape(-1, g.shape[-1]).sum(0).to(dtype)
