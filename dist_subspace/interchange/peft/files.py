"""What has been read from the files of an adapter, PEFT's or ours, and whether a model fits it. Local."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import PREFIX, file_key
from dist_subspace.interchange.base_copies import Copies
from dist_subspace.interchange.fitting import Shapes, check_fits
from dist_subspace.interchange.for_class import named_by
from dist_subspace.interchange.model_card import PEFT_TASKS
from dist_subspace.interchange.model_description import task_of_class
from dist_subspace.subspace import SubspaceConfig

Layers = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Imported:
    """config: of our method. tensors: by our file's keys. described: PEFT's adapter_config.json. shapes: `(d_out, d_in)` of the
    layers, None for a side that the tensors do not tell. needs_base: part of the adapter must be made from the base again.
    copies: of the base's own parameters, which must be the model's. layers: that an adapter of ours has, linear or not."""

    config: SubspaceConfig
    tensors: dict[str, Tensor]
    described: Mapping[str, Any]
    shapes: Shapes = field(default_factory=dict)
    needs_base: bool = False
    copies: Copies = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    @property
    def task(self) -> str | None:
        """Our name of the task, or that of the class that PEFT names where it has no task; None where it says neither."""
        task, mapping = self.described.get("task_type"), self.described.get("auto_mapping") or {}
        if task is not None:
            return next((ours for theirs, (_, ours) in PEFT_TASKS.items() if theirs == task), "base")
        return task_of_class(str(mapping["base_model_class"])) if mapping.get("base_model_class") else None

    def named_by(self, model: nn.Module) -> Imported:
        """With the names that a text model of a larger family has, where it has those of the whole."""
        config, tensors, known = named_by(model, self.config, self.tensors, dict.fromkeys(self.layers) | self.shapes)
        shapes = {layer: shape for layer, shape in known.items() if shape is not None}
        return replace(self, config=config, tensors=tensors, shapes=shapes, layers=tuple(known) if self.layers else ())

    def check(self, model: nn.Module) -> None:
        """Raises UsageError for a model that the adapter does not fit; the model is only looked at."""
        check_fits(model, self.config, self.tensors, self.described, self.shapes)


def split_saved(tensors: Mapping[str, Tensor], endings: Iterable[str]) -> tuple[dict[str, Tensor], Layers]:
    """The tensors of the method, and those of modules that were trained in full, by module: as PEFT finds them, the outermost
    whose name ends in the text, in the middle of a word or not."""
    own: dict[str, Tensor] = {}
    saved: Layers = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(PREFIX).split(".")
        modules = [".".join(parts[: n + 1]) for n in range(len(parts) - 1)]
        module = next((m for m in modules if m.endswith(tuple(endings))), None)
        if module is None or not key.startswith(PREFIX):
            own[key] = tensor
        else:
            saved.setdefault(module, {})[key] = tensor
    return own, saved


def with_tied(own: Mapping[str, Tensor], saved: Layers) -> tuple[dict[str, Tensor], Layers]:
    """What `split_saved` made of an adapter whose trained modules stayed tied (`ensure_weight_tying`): PEFT writes the other
    module's weight too, and its configuration does not name it."""
    trained = [tensor for held in saved.values() for tensor in held.values()]
    left: dict[str, Tensor] = {}
    more: Layers = {}
    for key, tensor in own.items():
        if key.startswith(PREFIX) and any(torch.equal(tensor, other) for other in trained):
            more.setdefault(key.removeprefix(PREFIX).rpartition(".")[0], {})[key] = tensor
        else:
            left[key] = tensor
    return left, saved | more


def by_layer(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str], kind: str) -> Layers:
    """The tensors of each layer under our suffixes.

    Arguments:
        suffixes: as PEFT writes them, now or earlier -> ours.

    Raises:
        UsageError: a tensor that is none of them, or a layer that lacks one.
    """
    layers: Layers = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in suffixes if key.startswith(PREFIX) and key.endswith(f".{s}")), None)
        if suffix is None:
            raise UsageError(
                f"the {kind} adapter holds {key}, which is not known here; accepted: of linear layers, {', '.join(suffixes)}"
            )
        layers.setdefault(key.removeprefix(PREFIX).removesuffix(f".{suffix}"), {})[suffixes[suffix]] = tensor
    for name, held in layers.items():
        missing = set(suffixes.values()) - held.keys()
        if missing:
            raise UsageError(f"the {kind} adapter lacks {min(missing)} of {name}; it was not saved whole")
    if not layers:
        raise UsageError(f"the {kind} adapter holds no tensors of any layer")
    return layers


def flat(layers: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tensors = {file_key(name, s): t.float() for name, held in layers.items() for s, t in held.items()}
    return tensors | {key: t.float() for held in saved.values() for key, t in held.items()}
