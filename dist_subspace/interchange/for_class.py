"""An adapter's entries and tensors with the names that another class gives to the same modules. Local."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dist_subspace.loading.own_class import own_class
from dist_subspace.subspace import SubspaceConfig
from dist_subspace.subspace.core.peft_words import PREFIX
from dist_subspace.subspace.core.registry import peft_words

BY_NAME = ("rank_pattern", "alpha_pattern")


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
    for entry in {"modules_to_save", *(name for words in peft_words() for name in words.module_lists)}:
        if isinstance(renamed.get(entry), list):
            renamed[entry] = [names.get(name, name) for name in renamed[entry]]
    for entry in BY_NAME:
        if renamed.get(entry):
            renamed[entry] = {names.get(name, name): value for name, value in renamed[entry].items()}
    return renamed, {renamed_key(key, names): tensor for key, tensor in tensors.items()}


def named_by(
    model: nn.Module, config: SubspaceConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> tuple[SubspaceConfig, dict[str, Tensor], dict[str, Any]]:
    """An adapter as its layers are called in a text model, where it has the names of the checkpoint's own class; else as it is.

    Arguments:
        shapes: of its layers, by name.
    """
    names = set(dict(model.named_modules()))
    larger = own_class(model) if shapes and not names.issuperset(shapes) else None
    ours = {} if larger is None else {theirs: name for name, theirs in larger.names.items()}
    if not ours or not ours.keys() >= shapes.keys():
        return config, dict(tensors), dict(shapes)

    def name(module: str) -> str:
        return ours.get(module, module)

    options, targets = dict(config.options), config.target_modules
    if isinstance(options.get("input_scaled_modules"), list | tuple):
        options["input_scaled_modules"] = [name(module) for module in options["input_scaled_modules"]]
    renamed = replace(
        config,
        target_modules=targets if targets is None or isinstance(targets, str) else tuple(map(name, targets)),
        modules_to_save=tuple(map(name, config.modules_to_save)),
        rank_pattern={name(module): rank for module, rank in config.rank_pattern.items()},
        alpha_pattern={name(module): alpha for module, alpha in config.alpha_pattern.items()},
        options=options,
    )
    return (
        renamed,
        {renamed_key(key, ours): tensor for key, tensor in tensors.items()},
        {name(module): shape for module, shape in shapes.items()},
    )


def renamed_key(key: str, names: Mapping[str, str]) -> str:
    """A tensor's key with the module in it, the longest one that is known, named otherwise."""
    parts = key.removeprefix(PREFIX).split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if key.startswith(PREFIX) and module in names:
            return f"{PREFIX}{names[module]}{key[len(PREFIX) + len(module) :]}"
    return key
