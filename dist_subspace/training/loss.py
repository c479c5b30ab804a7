"""The loss of a micro-batch as a sum over its targets: the global batch's mean is taken over all ranks at once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
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


# Logits that are turned into float32 at a time: 256 MiB, of which cross-entropy keeps up to three copies.
AT_ONCE = 2**26


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the targets, in float32.

    Labels of two dimensions are tokens, shifted as Hugging Face shifts them (a position predicts the next); of one, classes.
    A long row's logits outweigh the model (32,768 tokens of 128,256: 8 GiB in 16 bits, 47 with the copies of a whole
    cross-entropy): they go by rows of `AT_ONCE`, once more in backward, with the same gradient to the bit.
    """
    by_rows = logits.numel() > AT_ONCE
    if labels.dim() == 2 and by_rows:  # the last position predicts nothing; a slice without it would be a copy
        labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    elif labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    targets = to_device(labels.reshape(-1), flat.device)
    return _ByRows.apply(flat, targets) if by_rows else _summed(flat, targets)  # type: ignore[no-any-return]


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


class _ByRows(torch.autograd.Function):
    """`_summed` of some rows after the other; of logits `(n, v)` nothing is kept but themselves."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return torch.stack([_summed(*pair) for pair in _by_rows(logits, labels)]).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        of_logits = torch.empty_like(logits)
        for (rows, targets), place in zip(_by_rows(logits, labels), of_logits.split(_rows(logits)), strict=True):
            leaf = rows.detach().requires_grad_()
            with torch.enable_grad():
                loss = _summed(leaf, targets)
            place.copy_(torch.autograd.grad(loss, leaf, gradient)[0])
        return of_logits, None


def _rows(logits: Tensor) -> int:
    return max(1, AT_ONCE // logits.shape[-1])


def _by_rows(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(logits.split(_rows(logits)), labels.split(_rows(logits)), strict=True)


def logits_memory(count: int) -> int:
    """Bytes that so many logits take at the peak of a step, about: they and their gradient in 16 bits, and float32 copies."""
    return 4 * count + 12 * min(count, AT_ONCE)
