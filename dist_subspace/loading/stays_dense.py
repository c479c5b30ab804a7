"""What a packed storage does not hold: said before a weight is read, and refused where it would hold nothing at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.notices import named

_SMALL = 0.01  # of the model's weights: what is less is not worth a word, where no layer was expected to be packed


def check_packed(
    model: nn.Module, storage: str, dtype: torch.dtype, packed: Collection[str], apart: Mapping[str, str]
) -> list[str]:
    """Sentences about the weights that stay in `dtype` although linear weights are held in `storage`.

    Arguments:
        packed: names of the linear layers that the storage will hold.
        apart: linear layers that can be no operators, and why.

    Raises:
        UsageError: where the storage would hold nothing.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in apart.items():
        reasons.setdefault(reason, []).append(name)
    others = _other_matrices(model, packed, apart)
    if not packed:
        why = [f"{named(names)}: {reason}" for reason, names in reasons.items()] or ["it has no linear layers"]
        raise UsageError(
            f"model.storage is {storage!r}, but nothing of a {type(model).__name__} can be held in it ({'; '.join(why)}); "
            "accepted for it: bf16, fp16, fp32"
        )
    kind = str(dtype).removeprefix("torch.")
    sentences = [
        f"held in {kind} and not in {storage}: {named(names)} ({_size(_numel(model, names), dtype)}); {reason}"
        for reason, names in reasons.items()
    ]
    numel = sum(others.values())
    if numel > _SMALL * sum(p.numel() for p in model.parameters()):
        sentences.append(
            f"held in {kind} and not in {storage}: {named(list(others))} ({_size(numel, dtype)}); these are no linear layers"
        )
    return sentences


def _other_matrices(model: nn.Module, packed: Collection[str], apart: Mapping[str, str]) -> dict[str, int]:
    """Weights of two or more dimensions in the blocks that are neither a linear layer's nor a table's: name -> numel."""
    found = {}
    stacks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for name, module in model.named_modules():
        if (
            name in packed
            or name in apart
            or not name.startswith(stacks)
            or isinstance(module, nn.Embedding | nn.Linear)
        ):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2:
                found[f"{name}.{own}"] = parameter.numel()
    return found


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
