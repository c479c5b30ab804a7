"""Gradients that lie whole on the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Of the parameters that have one, in the model's order."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no entry is infinite or NaN. Each is asked before the first answer is waited for."""
    return all(map(bool, [gradient.isfinite().all() for gradient in gradients]))


def total_norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all of them as one vector."""
    return float(torch.nn.utils.get_total_norm(gradients))
