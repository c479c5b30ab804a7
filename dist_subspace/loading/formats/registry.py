"""The formats by `quantization_config.quant_method`, and which weights of a checkpoint are in one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import text_part
from dist_subspace.loading.held_weight import TYPES, HeldWeight, ReadBytes, Stored
from dist_subspace.loading.index import CheckpointIndex


@dataclass
class Found:
    """weights: the key of each weight, as a model without quantisation names it. dropped: keys that say nothing about weights.
    notes: what is worth saying, one sentence each."""

    weights: dict[str, HeldWeight] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


class Files:
    """What a format looks at: the tensors of a checkpoint by key, and the bytes of small ones."""

    def __init__(self, index: CheckpointIndex, read: ReadBytes) -> None:
        self.index, self.read = index, read

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __contains__(self, key: str) -> bool:
        return key in self.index.files

    def stored(self, key: str, weight: str) -> Stored:
        """A tensor that belongs to a weight.

        Raises:
            UsageError: it is not there, or of a type that no format has.
        """
        if key not in self:
            raise self.refusal(f"lack {key}, without which {weight} cannot be read; the checkpoint is incomplete")
        kind = TYPES.get(self.index.types[key])
        if kind is None:
            raise self.refusal(f"hold {key} as {self.index.types[key]}; accepted: {', '.join(TYPES)}")
        return Stored(key, self.index.shapes[key], kind)

    def check(self, part: Stored, types: tuple[torch.dtype, ...], numel: int) -> Stored:
        """The tensor, which must have one of the types, and so many entries (UsageError)."""
        if part.dtype not in types or part.numel != numel:
            wanted = " or ".join(str(kind).removeprefix("torch.") for kind in types)
            raise self.refusal(
                f"hold {part.key} as {str(part.dtype).removeprefix('torch.')} {list(part.shape)}; expected {wanted} with "
                f"{numel:,} entries; the checkpoint is damaged or of another format"
            )
        return part

    def refusal(self, what: str) -> UsageError:
        return UsageError(f"model.path is {str(self.index.folder)!r}, whose quantised weights {what}")


Find = Callable[[Files, Mapping[str, Any]], Found]
_FORMATS: dict[str, list[Find]] = {}


def reads(*methods: str) -> Callable[[Find], Find]:
    """Decorator of a function that finds the weights of a format, which `quant_method` calls by one of these names."""

    def add(find: Find) -> Find:
        for method in methods:
            _FORMATS.setdefault(method, []).append(find)
        return find

    return add


def read_methods() -> tuple[str, ...]:
    """The names of the formats that are read."""
    return tuple(sorted(_FORMATS))


def quantisation_of(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a model's configuration, or of its part that speaks of text; None where it has none."""
    for part in (config, text_part(config)):
        settings = getattr(part, "quantization_config", None)
        if settings:
            return dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    return None


def take_quantisation(config: Any) -> dict[str, Any] | None:
    """The same, which the configuration has no longer: what becomes of the weights is no format of a file."""
    settings = quantisation_of(config)
    for part in (config, text_part(config)):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config
    return settings


def method_of(settings: Mapping[str, Any]) -> str:
    """`quant_method`; older folders of bitsandbytes lack it."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(getattr(settings.get("quant_method"), "value", settings.get("quant_method", "")))


def find_weights(index: CheckpointIndex, settings: Mapping[str, Any], read: ReadBytes) -> Found:
    """The quantised weights of a checkpoint, checked from headers and small tensors alone.

    Raises:
        UsageError: tensors that are missing, or of another type or shape than the format's.
    """
    found, files = Found(), Files(index, read)
    for find in _FORMATS[method_of(settings)]:
        one = find(files, settings)
        found.weights |= one.weights
        found.dropped |= one.dropped
        found.notes += one.notes
    if not found.weights:
        found.notes.append(
            f"{index.folder / 'config.json'} has a quantization_config ({method_of(settings)}), but none of the weights is "
            "quantised: they are read as the numbers that they are"
        )
    return found


def discover(folder: Iterable[str]) -> None:
    """Import every file of the package: those that read a format register it."""
    for module in pkgutil.iter_modules(folder, "dist_subspace.loading.formats."):
        importlib.import_module(module.name)
