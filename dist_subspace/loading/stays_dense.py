"""Linear layers that a packed storage does not hold: said before a weight is read; refused where it would hold nothing at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from dist_subspace.errors import UsageError
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
