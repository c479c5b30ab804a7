"""Logits, labels and torch's own loss of them, for those who make the same in pieces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dist_subspace.training.data.samples import IGNORED

ROWS, CLASSES, WIDTH = 23, 40, 6
TYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def labels(ignored: bool = True) -> Tensor:
    found = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(7))
    if ignored:
        found[[0, 5, ROWS - 1]] = IGNORED
    return found


def torchs(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def assert_near(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert found is not None and expected is not None and found.dtype == expected.dtype
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < tolerance
