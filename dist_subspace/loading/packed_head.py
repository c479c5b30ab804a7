"""A language model's head in a storage of its own (`model.head_storage`): which module that is, or why there is none."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.families.embeddings import input_embeddings, output_embeddings
from dist_subspace.storage import is_linear, options_for, storage_info, storages


def head_options(
    head_storage: str | None, storage: str, double_quant: bool, options: Any, dtype: torch.dtype
) -> dict[str, Any] | None:
    """The options of the head's storage: those of `model.storage` where both are one, else its defaults; None where the head
    stays in the type of the computation.

    Raises:
        UsageError: a storage that is not registered, or one of floats that is no type of the computation.
    """
    if head_storage is None:
        return None
    if head_storage not in storages():
        raise unknown_name("model.head_storage", head_storage, storages())
    own_type = storage_info(head_storage).dtype
    if own_type is not None and own_type != dtype:
        raise UsageError(
            f"model.head_storage is {head_storage!r}, and the head computes in {str(dtype).removeprefix('torch.')}; accepted: "
            f"null, {', '.join(name for name, info in storages().items() if info.dtype is None)}"
        )
    return (
        None
        if own_type is not None
        else options_for(head_storage, double_quant, options if head_storage == storage else None)
    )


def packed_head(model: nn.Module, head_storage: str, apart: Collection[str]) -> str:
    """The name of the head that the storage holds.

    Arguments:
        apart: names of the linear layers that can be no operators.

    Raises:
        UsageError: there is no language model's head, it is the embedding's own table, or it is no linear layer.
    """
    head, table = output_embeddings(model), input_embeddings(model)
    name = next((n for n, module in model.named_modules() if module is head), None)
    why = None
    if head is None or name is None:
        why = f"a {type(model).__name__} has no language model's head"
    elif table is not None and getattr(head, "weight", None) is getattr(table, "weight", None):
        why = f"{name} of this {type(model).__name__} is its embedding, whose rows are looked up as they are"
    elif not is_linear(head) or name in apart:
        why = f"{name} of a {type(model).__name__} is a {type(head).__name__}, which is more than a product"
    if why is not None or name is None:
        raise UsageError(f"model.head_storage is {head_storage!r}, but {why}; accepted: null")
    return name
