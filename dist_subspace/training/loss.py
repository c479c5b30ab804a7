"""The loss of a micro-batch as a sum over its targets: the global batch's mean is taken over all ranks at once."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.placement.protocol import Engine
from dist_subspace.training.data import MicroBatch

IGNORED = -100


def forward(model: nn.Module | Engine, batch: MicroBatch, device: torch.device) -> Tensor:
    """The model's logits: `(b, t, vocabulary)`, or `(b, classes)`; `model` may be the engine around it."""
    inputs = {
        name: to_device(value, device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()
    }
    kind: Any = type(getattr(model, "module", model))
    if batch.labels.dim() == 2:
        inputs["use_cache"] = False  # a decoder in training keeps no keys and values
    return model(**{name: value for name, value in inputs.items() if name in _accepted(kind)}).logits


@functools.lru_cache(maxsize=16)
def _accepted(model: Any) -> frozenset[str]:
    """What the model's forward takes: position_ids and use_cache are not for every family. Segment lengths of a packed
    row pass through its keyword arguments."""
    return frozenset(inspect.signature(model.forward).parameters) | _SEGMENTS


_SEGMENTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor, copied behind the device's other work: what a GPU still has to do is not waited for."""
    return tensor.to(device, non_blocking=True)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the targets, in float32.

    Labels of two dimensions are tokens, shifted as Hugging Face shifts them (a position predicts the next); of one, classes.
    """
    if labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return functional.cross_entropy(
        flat, to_device(labels.reshape(-1), flat.device), ignore_index=IGNORED, reduction="sum"
    )
