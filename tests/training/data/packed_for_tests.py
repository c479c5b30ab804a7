"""Packed rows, and the loss of the same samples packed and alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def packed_rows(parts: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two rows: samples 0 to 2, and 3 and 4 with padding as a segment of its own."""
    pad = 23 - len(parts[3]) - len(parts[4])
    rows = [[*parts[:3]], [*parts[3:], torch.ones(pad, dtype=torch.long)]]
    ids = torch.stack([torch.cat(row) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(len(part)) for part in row]) for row in rows])
    labels = torch.where(positions == 0, -100, ids)
    labels[1, 23 - pad :] = -100
    return {"input_ids": ids, "position_ids": positions}, labels


def total_loss(model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def alone(model: nn.Module, parts: list[torch.Tensor]) -> torch.Tensor:
    return sum((total_loss(model, {"input_ids": p[None]}, p[None]) for p in parts if len(p) > 1), torch.zeros(()))
