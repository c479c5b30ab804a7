"""Held-out loss and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.placement.collectives import sum_over_ranks
from dist_subspace.placement.protocol import Engine
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import forward, micro_batch_loss, summed_loss


@torch.no_grad()
def evaluate(
    model: nn.Module | Engine,
    rounds: Iterator[MicroBatch | None],
    filler: MicroBatch,
    device: torch.device,
    classes: int | None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Collective: mean loss over the held-out targets, and perplexity (tokens) or accuracy and F1 (classes).

    Every rank makes the same number of forward calls; one that has run out of samples runs the filler for nothing.
    `stopped` is asked before each call, by all ranks alike; None if it said so. F1 is that of class 1 where there are two
    classes, else the mean over the classes that occur.
    """
    confusion = torch.zeros(classes, classes, dtype=torch.float64) if classes else None
    loss = targets = 0.0
    with _measured(model):
        for batch in rounds:
            if stopped():
                return None
            used = filler if batch is None else batch
            logits = None if confusion is None else forward(model, used, device)
            value = micro_batch_loss(model, used, device) if logits is None else summed_loss(logits, used.labels)
            if batch is not None:
                loss += float(value)
                targets += batch.targets
                if confusion is not None and logits is not None:
                    _count(confusion, logits.argmax(-1).cpu(), batch.labels)
    counts = [] if confusion is None else confusion.flatten().tolist()
    loss, targets, *summed = sum_over_ranks([loss, targets, *counts])
    result: dict[str, Any] = {"eval_loss": loss / max(1.0, targets)}
    if confusion is None:
        result["eval_perplexity"] = math.exp(min(result["eval_loss"], 700.0))
    else:
        result |= scores(torch.tensor(summed, dtype=torch.float64).view_as(confusion))
    return result


@contextmanager
def _measured(model: nn.Module | Engine) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def scores(confusion: Tensor) -> dict[str, float]:
    """Accuracy and F1 from counts `(true class, predicted class)`.

    Two classes: F1 of class 1, 0 where it neither occurs nor is predicted (scikit-learn's `average="binary"`). More: the mean of
    F1 over the classes that are true or predicted somewhere (its `average="macro"`): an id that no sample has, and a class
    that this part of the data lacks, are no failures.
    """
    hits = confusion.diagonal()
    made = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * hits / made.clamp(min=1)
    occurs = made > 0
    binary = confusion.shape[0] == 2
    return {
        "eval_accuracy": float(hits.sum() / confusion.sum().clamp(min=1)),
        "eval_f1": float(f1[1] if binary else f1[occurs].sum() / occurs.sum().clamp(min=1)),
    }


def _count(confusion: Tensor, predicted: Tensor, true: Tensor) -> None:
    pairs = true * confusion.shape[1] + predicted
    confusion += torch.bincount(pairs, minlength=confusion.numel()).view_as(confusion)
