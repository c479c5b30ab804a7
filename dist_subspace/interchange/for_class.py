"""An export's entries and tensors with the names that another class gives to the same modules. Local."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_subspace.interchange.adapter import PREFIX

LISTS, BY_NAME = ("target_modules", "modules_to_save", "feedforward_modules"), ("rank_pattern", "alpha_pattern")


def named_for(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], layers: list[str], names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's entries and tensors for a class that calls each module `names[module]`.

    Arguments:
        layers: the adapter's, as the model that was trained has them; each is named whole, so that no other part of the larger
            model, whose layers may end alike, is meant.
    """
    renamed = dict(config)
    if renamed.get("target_modules"):
        renamed["target_modules"] = sorted(names[layer] for layer in layers)
    for entry in LISTS[1:]:
        if isinstance(renamed.get(entry), list):
            renamed[entry] = [names.get(name, name) for name in renamed[entry]]
    for entry in BY_NAME:
        if renamed.get(entry):
            renamed[entry] = {names.get(name, name): value for name, value in renamed[entry].items()}
    return renamed, {renamed_key(key, names): tensor for key, tensor in tensors.items()}


def renamed_key(key: str, names: Mapping[str, str]) -> str:
    """A tensor's key with the module in it, the longest one that is known, named otherwise."""
    parts = key.removeprefix(PREFIX).split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if key.startswith(PREFIX) and module in names:
            return f"{PREFIX}{names[module]}{key[len(PREFIX) + len(module) :]}"
    return key
