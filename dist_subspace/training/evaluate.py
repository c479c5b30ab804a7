"""Held-out loss and what follows from it, in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_subspace.metrics import classes as of_classes
from dist_subspace.metrics.losses import perplexity
from dist_subspace.placement.collectives import sum_over_ranks
from dist_subspace.placement.evaluation_mode import in_evaluation
from dist_subspace.placement.protocol import Engine
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.sample_results import sample_results


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
    confusion = np.zeros((classes, classes)) if classes else None
    loss = targets = 0.0
    with in_evaluation(model):
        for batch in rounds:
            if stopped():
                return None
            found = sample_results(model, filler if batch is None else batch, device)
            if batch is not None:
                loss += float(found.losses.sum())
                targets += batch.targets
                if confusion is not None and found.predicted is not None:
                    confusion += of_classes.confusion(batch.labels.numpy(), found.predicted, len(confusion))
    counts = [] if confusion is None else confusion.flatten().tolist()
    loss, targets, *summed = sum_over_ranks([loss, targets, *counts])
    result: dict[str, Any] = {"eval_loss": loss / max(1.0, targets)}
    if confusion is None:
        result["eval_perplexity"] = perplexity(result["eval_loss"])
    else:
        counted = np.reshape(summed, confusion.shape)
        result |= {"eval_accuracy": of_classes.accuracy(counted), "eval_f1": of_classes.f1(counted)}
    return result
