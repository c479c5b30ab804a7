"""What a model makes of each sample of a micro-batch, without dropout and without gradients: the ground of every evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dist_subspace.placement.protocol import Engine
from dist_subspace.training.cross_entropy import cross_entropies
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.data.samples import IGNORED
from dist_subspace.training.loss import forward, target_losses, to_device


@dataclass(frozen=True)
class SampleResults:
    """Of the b samples of a micro-batch, one a row.

    losses: `(b,)` float64, cross-entropy summed over each sample's targets; targets: `(b,)` int64, how many these are;
    predicted: `(b,)` int64, the likeliest class, where samples are classified.
    """

    losses: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray | None = None


@torch.no_grad()
def sample_results(model: nn.Module | Engine, batch: MicroBatch, device: torch.device) -> SampleResults:
    """Collective where parameters are split: the results of one micro-batch of samples that are not packed."""
    if batch.labels.dim() == 1:
        logits = forward(model, batch, device)
        losses = cross_entropies(logits, to_device(batch.labels, logits.device)).double().cpu().numpy()
        return SampleResults(losses, np.ones(len(losses), np.int64), logits.argmax(-1).cpu().numpy())
    of_targets = target_losses(model, batch, device).double().cpu().numpy()
    is_target = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).numpy() != IGNORED
    rows = np.repeat(np.arange(len(is_target)), is_target.sum(1))
    losses = np.bincount(rows, of_targets, minlength=len(is_target))
    return SampleResults(losses, is_target.sum(1).astype(np.int64))
