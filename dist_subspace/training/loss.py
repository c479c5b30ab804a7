"""The loss of a micro-batch as a sum over its targets: the global batch's mean is taken over all ranks at once."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.placement.protocol import Engine
from dist_subspace.training.cross_entropy import (
    PIECE,
    cross_entropies,
    each_cross_entropy,
    summed_cross_entropy,
    targets_of,
)
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.data.samples import IGNORED
from dist_subspace.training.head_loss import loss_in_head, proof_of
from dist_subspace.training.router_loss import ASKS, RouterLoss, router_loss_of


def target_losses(model: nn.Module | Engine, batch: MicroBatch, device: torch.device) -> Tensor:
    """Collective where parameters are split: the cross-entropy of each target of the micro-batch, `(targets,)` float32, row by
    row, made as `micro_batch_loss` makes their sum; differentiable where autograd is on. Without what trained routers add."""
    return losses_and_output(model, batch, device)[0]


def losses_and_output(
    model: nn.Module | Engine, batch: MicroBatch, device: torch.device, routers: RouterLoss | None = None
) -> tuple[Tensor, Any]:
    """What `target_losses` gives, and the model's output, from which `routers` make their own loss."""
    is_trained = torch.is_grad_enabled() and _trains_head(model)
    proof = None if is_trained else proof_of(model, batch.inputs["input_ids"], device)
    if proof is not None and proof.reason is None:
        outputs: list[Any] = []

        def run() -> Any:
            outputs.append(_output(model, batch, device, routers))
            return outputs[0]

        losses = loss_in_head(model, run, batch.labels, batch.targets, proof.program, apart=True)
        return losses, outputs[0]
    places, targets = targets_of(batch.labels, batch.targets)
    output = _output(model, batch, device, routers)
    logits = output.logits.flatten(0, 1)
    own, classes = logits[to_device(places, logits.device)], to_device(targets, logits.device)
    made = each_cross_entropy if torch.is_grad_enabled() else cross_entropies
    return made(own, classes), output


def _trains_head(model: nn.Module | Engine) -> bool:
    """Whether something of the head's own is trained, whose gradient is no sum of what single rows give."""
    head = output_embeddings(getattr(model, "module", model))  # type: ignore[arg-type]
    return head is not None and any(parameter.requires_grad for parameter in head.parameters())


def micro_batch_loss(model: nn.Module | Engine, batch: MicroBatch, device: torch.device) -> Tensor:
    """Collective where parameters are split: cross-entropy summed over the micro-batch's targets, in float32; `model` may be the
    engine around it. A language model's is made inside its head where that is right (`whole_logits_because`). In training, what
    trained routers add is in it (router_loss.py)."""
    routers = router_loss_of(model) if torch.is_grad_enabled() else None
    proof = None if batch.labels.dim() != 2 else proof_of(model, batch.inputs["input_ids"], device)
    if proof is None or proof.reason is not None:
        output = _output(model, batch, device, routers)
        loss = summed_loss(output.logits, batch.labels)
    else:
        outputs: list[Any] = []

        def run() -> Any:
            outputs.append(_output(model, batch, device, routers))
            return outputs[0]

        loss = loss_in_head(model, run, batch.labels, batch.targets, proof.program)
        output = outputs[0]
    return loss if routers is None else loss + routers.summed(output, batch.targets)


def whole_logits_because(model: nn.Module | Engine, batch: MicroBatch, device: torch.device) -> str | None:
    """Collective where parameters are split: why the model's loss is made of whole logits, tokens x vocabulary; None where it is
    made inside the head, and for classes."""
    if batch.labels.dim() != 2:
        return None
    return proof_of(model, batch.inputs["input_ids"], device).reason


def forward(model: nn.Module | Engine, batch: MicroBatch, device: torch.device) -> Tensor:
    """The model's logits: `(b, t, vocabulary)`, or `(b, classes)`; `model` may be the engine around it."""
    logits: Tensor = _output(model, batch, device).logits
    return logits


def _output(
    model: nn.Module | Engine, batch: MicroBatch, device: torch.device, routers: RouterLoss | None = None
) -> Any:
    inputs = {
        name: to_device(value, device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()
    }
    kind: Any = type(getattr(model, "module", model))
    if batch.labels.dim() == 2:
        inputs["use_cache"] = False  # a decoder in training keeps no keys and values
    if routers is not None:
        inputs[ASKS] = True
    return model(**{name: value for name, value in inputs.items() if name in _accepted(kind)})


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
    """Cross-entropy summed over the targets, in float32, of which there is a piece of the rows at a time.

    Labels of two dimensions are tokens, shifted as Hugging Face shifts them (a position predicts the next); of one, classes.
    """
    if labels.dim() == 2:  # the last position predicts nothing; a slice without it would be a copy
        logits, labels = logits.flatten(0, 1), functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    return summed_cross_entropy(logits, to_device(labels, logits.device))


def logits_memory(count: int) -> int:
    """Bytes that a loss over so many logits takes at the peak of a step, about, where it is made inside the head: a piece of
    them, in 16 bits and in float32."""
    return 6 * min(count, PIECE)
