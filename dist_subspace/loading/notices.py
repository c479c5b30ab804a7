"""What a load has to say to the person, besides the model that it returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from dist_subspace.placement.collectives import world
from dist_subspace.placement.zero import full_numel, full_shape
from dist_subspace.storage import FrozenLinear, storage_info


def tell(sentence: str, notice: Callable[[str], None] | None) -> None:
    """By the caller's own means, or as a Python warning of rank 0."""
    if notice is not None:
        notice(sentence)
    elif world().is_main:
        warnings.warn(sentence, UserWarning, stacklevel=4)


def held_dense(model: nn.Module, storage: str) -> list[str]:
    """What a packed storage leaves in floating point although it is large: experts, which are one stack of matrices and no
    linear layers, and layers that the family keeps in float32. One sentence each."""
    if storage_info(storage).dtype is not None:
        return []
    stacks = {
        f"{name}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if not isinstance(module, FrozenLinear | nn.Embedding)
        for own, parameter in module.named_parameters(recurse=False)
        if len(full_shape(parameter)) == 3 and min(full_shape(parameter)[1:]) > 1
    }
    experts = {name: parameter for name, parameter in stacks.items() if _is_expert(name)}
    if not experts:
        return []
    held = sum(full_numel(p) * p.element_size() for p in experts.values())
    first = next(iter(experts.values()))
    kind = str(first.dtype).removeprefix("torch.")
    return [
        f"{len(experts)} stacks of experts are not held in {storage} but in {kind}, {held / 2**20:,.1f} MiB over all ranks "
        f"({', '.join(list(experts)[:2])}{', ...' if len(experts) > 2 else ''}): only linear layers are packed"
    ]


def _is_expert(name: str) -> bool:
    """Convolutions have three dimensions too; they are small, and are no experts."""
    return "conv" not in name
