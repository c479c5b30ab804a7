"""The text model of a larger family (vision and language), and the names of its modules in the class of the whole.

A checkpoint's config.json names the class that it was saved from, and PEFT or vLLM load that one. Where it was loaded as its text
model alone, the same weights have other names there: `model.layers.0` is `model.language_model.layers.0`. Both classes name the
tensors of the same file, so the file's keys say which is which.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.loading.index import open_checkpoint
from dist_subspace.loading.load import local_folder
from dist_subspace.loading.names import checkpoint_key
from dist_subspace.loading.transformers_internals import base_prefix, empty_model, renamed_keys


@dataclass(frozen=True)
class OwnClass:
    """name: of the class in transformers; names: a module of the text model -> the module of the whole with the same weights."""

    name: str
    names: dict[str, str]

    def of(self, modules: Iterable[str]) -> dict[str, str] | None:
        """The names of these modules in the whole; None where it lacks one (a head for another task)."""
        found = {name: self.names.get(name) for name in modules}
        return {ours: theirs for ours, theirs in found.items() if theirs} if all(found.values()) else None


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
    folder = local_folder(getattr(config, "_name_or_path", None))
    if folder is None or not (folder / "config.json").exists():
        return None
    try:
        whole = transformers.AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError):
        return None
    kind = getattr(transformers, next(iter(whole.architectures or ()), ""), None)
    if kind is None or type(config) is type(whole) or type(config) not in whole.sub_configs.values():
        return None
    theirs, ours = empty_model(kind, whole), empty_model(type(model), config)
    return OwnClass(kind.__name__, _by_place(ours, theirs) | _by_key(ours, theirs, folder))


def _by_key(ours: nn.Module, theirs: nn.Module, folder: Path) -> dict[str, str]:
    """Modules whose weights are one tensor of the file."""
    try:
        own, keys = _modules(ours, folder), {key: name for name, key in _modules(theirs, folder).items()}
    except UsageError:  # weights of another format: transformers loaded them
        return {}
    return {name: keys[key] for name, key in own.items() if key in keys}


def _by_place(ours: nn.Module, theirs: nn.Module) -> dict[str, str]:
    """Modules of the same place in the two decoders, and the two output layers, where their weights have one shape: of a text
    model whose own names the file does not have (it was given another mapping of keys)."""
    found = {}
    for get in ("get_decoder", "get_output_embeddings"):
        first, second = (getattr(model, get, lambda: None)() for model in (ours, theirs))
        if first is None or second is None:
            continue
        starts = [
            next((n for n, m in model.named_modules() if m is part), "")
            for model, part in ((ours, first), (theirs, second))
        ]
        shapes = [
            {n: m.weight.shape for n, m in part.named_modules() if hasattr(m, "weight")} for part in (first, second)
        ]
        alike = [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]
        found |= {_joined(starts[0], name): _joined(starts[1], name) for name in alike}
    return found


def _joined(start: str, name: str) -> str:
    return ".".join(part for part in (start, name) if part)


def _modules(model: nn.Module, folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each module with a weight -> the file's key of it, and its shape in the model."""
    names, prefix = renamed_keys(model, open_checkpoint(folder)), base_prefix(model)
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, own = name.rpartition(".")
        key = checkpoint_key(name, names, prefix) if own == "weight" else None
        if key is not None:
            found[module] = (key, tuple(parameter.shape))
    return found
