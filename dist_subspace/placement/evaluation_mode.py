"""A model that is asked and not trained, for now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dist_subspace.placement.protocol import Engine


@contextmanager
def in_evaluation(model: nn.Module | Engine) -> Iterator[None]:
    """Within the block there is no dropout; afterwards the model is in the mode that it was in. Local."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
