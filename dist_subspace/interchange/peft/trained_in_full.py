"""The tensors of modules that were trained in full, told from the method's in a file that PEFT wrote. Local."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dist_subspace.subspace.core.peft_words import PREFIX, Layers


def split_saved(tensors: Mapping[str, Tensor], endings: Iterable[str]) -> tuple[dict[str, Tensor], Layers]:
    """The tensors of the method, and those of modules that were trained in full, by module: as PEFT finds them, the outermost
    whose name ends in the text, in the middle of a word or not."""
    of_method: dict[str, Tensor] = {}
    saved: Layers = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(PREFIX).split(".")
        modules = [".".join(parts[: n + 1]) for n in range(len(parts) - 1)]
        module = next((m for m in modules if m.endswith(tuple(endings))), None)
        if module is None or not key.startswith(PREFIX):
            of_method[key] = tensor
        else:
            saved.setdefault(module, {})[key] = tensor
    return of_method, saved


def with_tied(of_method: Mapping[str, Tensor], saved: Layers) -> tuple[dict[str, Tensor], Layers]:
    """What `split_saved` made of an adapter whose trained modules stayed tied (`ensure_weight_tying`): PEFT writes the other
    module's weight too, and its configuration does not name it."""
    trained = [tensor for held in saved.values() for tensor in held.values()]
    left: dict[str, Tensor] = {}
    more: Layers = {}
    for key, tensor in of_method.items():
        if key.startswith(PREFIX) and any(torch.equal(tensor, other) for other in trained):
            more.setdefault(key.removeprefix(PREFIX).rpartition(".")[0], {})[key] = tensor
        else:
            left[key] = tensor
    return left, saved | more


def of_no_layer(tensors: Mapping[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """The tensors of `modules_to_save`: of no layer, and of the model itself."""
    of_layers = tuple(f"{PREFIX}{name}." for name in layers)
    return {key: t for key, t in tensors.items() if key.startswith(PREFIX) and not key.startswith(of_layers)}
