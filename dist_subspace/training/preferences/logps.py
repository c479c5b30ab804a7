"""How likely a model finds answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.placement.evaluation_mode import in_evaluation
from dist_subspace.placement.protocol import Engine
from dist_subspace.training.cross_entropy import targets_of
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import losses_and_output, to_device
from dist_subspace.training.router_loss import router_loss_of


def token_logps(model: nn.Module | Engine, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Collective where parameters are split: the log probability of each target, `(b, t - 1)` float32 and 0 elsewhere,
    differentiable where autograd is on; and what trained routers add to the loss, as a sum over the terms."""
    routers = router_loss_of(model) if torch.is_grad_enabled() else None
    losses, output = losses_and_output(model, batch, device, routers)
    places, _ = targets_of(batch.labels, batch.targets)
    rows, width = batch.labels.shape
    whole = losses.new_zeros(rows * width).scatter(0, to_device(places, losses.device), -losses)
    balance = None if routers is None else routers.summed(output, batch.terms)
    return whole.view(rows, width)[:, :-1], balance


@torch.no_grad()
def measured_logps(model: nn.Module | Engine, batch: MicroBatch, device: torch.device) -> Tensor:
    """Collective where parameters are split: the sum of each row's targets, `(b,)`, without dropout."""
    with in_evaluation(model):
        return token_logps(model, batch, device)[0].sum(1)
