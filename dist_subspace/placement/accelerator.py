"""What DeepSpeed computes on, said before it is imported."""

from __future__ import annotations

import os

import torch


def choose_accelerator() -> None:
    """DeepSpeed warns at import that it found no GPU; say it first, where there is none."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
