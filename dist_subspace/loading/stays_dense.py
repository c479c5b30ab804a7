"""What a packed storage does not hold: heads and what is tied to them, and layers that are said before a weight is read. A
storage that would hold nothing at all is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.families.embeddings import input_embeddings, output_embeddings
from dist_subspace.families.heads import (
    base_prefix,
    is_head_layer,
    is_inside_classification_head,
    is_inside_head,
    is_inside_pooler,
)
from dist_subspace.notices import named


def check_packed(
    model: nn.Module, storage: str, dtype: torch.dtype, packed: Collection[str], apart: Mapping[str, str]
) -> list[str]:
    """Sentences about the linear layers that stay in `dtype` although such layers are held in `storage`.

    Arguments:
        packed: names of the linear layers that the storage will hold.
        apart: linear layers that can be no operators, and why.

    Raises:
        UsageError: where the storage would hold nothing.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in apart.items():
        reasons.setdefault(reason, []).append(name)
    if not packed:
        why = [f"{named(names)}: {reason}" for reason, names in reasons.items()] or ["it has no linear layers"]
        raise UsageError(
            f"model.storage is {storage!r}, but nothing of a {type(model).__name__} can be held in it ({'; '.join(why)}); "
            "accepted for it: bf16, fp16, fp32"
        )
    kind = str(dtype).removeprefix("torch.")
    return [
        f"held in {kind} and not in {storage}: {named(names)} ({_size(_numel(model, names), dtype)}); {reason}"
        for reason, names in reasons.items()
    ]


def _numel(model: nn.Module, names: Collection[str]) -> int:
    modules = {model.get_submodule(name) for name in names}
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False))


def _size(numel: int, dtype: torch.dtype) -> str:
    size = float(numel * dtype.itemsize)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def may_lack(model: nn.Module, name: str) -> bool:
    """Whether a checkpoint may lack the parameter: a head for a new task is trained anew. A language model's output layer is no
    such head: without it the model says nothing."""
    if is_inside_pooler(name):
        return True
    if output_embeddings(model) is not None:
        return False
    prefix = base_prefix(model)
    return is_inside_head(name) or (bool(prefix) and not name.startswith(f"{prefix}."))


def is_output(model: nn.Module, name: str, weight: nn.Parameter) -> bool:
    """Whether it is a head's weight, or one that is tied to an embedding: these stay in the type of the computation."""
    if is_inside_classification_head(name):
        return True
    head, inputs = output_embeddings(model), input_embeddings(model)
    tied = inputs is not None and getattr(inputs, "weight", None) is weight
    return tied or is_head_layer(name) or (head is not None and getattr(head, "weight", None) is weight)
