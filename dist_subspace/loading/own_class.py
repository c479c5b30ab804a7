"""The text model of a larger family (vision and language), and the names of its modules in the class of the whole.

A checkpoint's config.json names the class that it was saved from, and PEFT or vLLM load that one. Where it was loaded as its text
model alone, the same weights have other names there: `model.layers.0` is `model.language_model.layers.0`. The decoder is of
one class in both, so that within it the names are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import nn

from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.loading.load import source_folder
from dist_subspace.loading.transformers_internals import empty_model


@dataclass(frozen=True)
class OwnClass:
    """name: of the class in transformers; names: a module of the text model -> the module of the whole with the same weights."""

    name: str
    names: dict[str, str]

    def of(self, modules: Iterable[str]) -> dict[str, str] | None:
        """The names of these modules in the whole; None where it lacks one (a head for another task)."""
        renamed = {name: self.names.get(name) for name in modules}
        return {ours: theirs for ours, theirs in renamed.items() if theirs} if all(renamed.values()) else None


def own_class(model: nn.Module) -> OwnClass | None:
    """The class of the checkpoint that a text model was loaded from; None where that is no larger family. Local.

    Layers must stand where transformers put them; what is attached to them does not matter.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _own_class(model)
    return _KNOWN[model]


_KNOWN: WeakKeyDictionary[nn.Module, OwnClass | None] = WeakKeyDictionary()


def _own_class(model: nn.Module) -> OwnClass | None:
    config: Any = getattr(model, "config", None)
    folder = source_folder(model)
    if folder is None or not (folder / "config.json").exists():
        return None
    try:
        whole = transformers.AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError):
        return None
    whole_class = getattr(transformers, next(iter(whole.architectures or ()), ""), None)
    if whole_class is None or type(config) is type(whole) or type(config) not in whole.sub_configs.values():
        return None
    theirs, ours = empty_model(whole_class, whole), empty_model(type(model), config)
    return OwnClass(whole_class.__name__, _by_place(ours, theirs))


def _by_place(ours: nn.Module, theirs: nn.Module) -> dict[str, str]:
    """The name in the whole of each module of the text model whose weight stands at the same place there, with the same shape: in
    parts of one class, of which the whole has one, and in the two output layers."""
    pairs: list[tuple[nn.Module | None, nn.Module | None]] = []
    for part in ours.children():
        same = [module for module in theirs.modules() if type(module) is type(part)]
        pairs += [(part, same[0])] if len(same) == 1 else []
    pairs.append((output_embeddings(ours), output_embeddings(theirs)))
    names: dict[str, str] = {}
    for first, second in pairs:
        if first is not None and second is not None:
            start, other = _name(ours, first), _name(theirs, second)
            shapes = {name: module.weight.shape for name, module in second.named_modules() if hasattr(module, "weight")}
            names |= {
                _joined(start, name): _joined(other, name)
                for name, module in first.named_modules()
                if hasattr(module, "weight") and shapes.get(name) == module.weight.shape
            }
    return names


def _name(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _joined(start: str, name: str) -> str:
    return ".".join(part for part in (start, name) if part)
