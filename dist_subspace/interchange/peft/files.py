"""What has been read from the files of an adapter, PEFT's or ours, and whether a model fits it. Local."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.interchange.adapter import file_key
from dist_subspace.interchange.base_copies import Copies
from dist_subspace.interchange.fitting import check_fits
from dist_subspace.interchange.for_class import named_by
from dist_subspace.interchange.model_card import PEFT_TASKS
from dist_subspace.interchange.model_description import task_of_class
from dist_subspace.subspace import SubspaceConfig
from dist_subspace.subspace.core.peft_words import PREFIX, Entries, Layers, PeftWords, Shapes


@dataclass(frozen=True)
class Imported:
    """An adapter that was read, by us or from PEFT.

    config: of our method. tensors: by our file's keys. described: the adapter_config.json. shapes: `(d_out, d_in)` of the layers,
    None for a side that the tensors do not tell. made_from_base: the entry that says that a part of the adapter must be made
    from the base again; None where the file holds all. copies: of the base's own parameters, which must be the model's.
    layers: that an adapter of ours has, linear or not.
    """

    config: SubspaceConfig
    tensors: dict[str, Tensor]
    described: Mapping[str, Any]
    shapes: Shapes = field(default_factory=dict)
    made_from_base: str | None = None
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


def imported(
    words: PeftWords[Any], described: Entries, tensors: dict[str, Tensor], saved: Layers, copies: Copies
) -> Imported:
    """An adapter of PEFT as the method's that these are the words of.

    Arguments:
        tensors: the method's own. saved: those of modules that were trained in full. copies: of the base's own parameters.

    Raises:
        UsageError: as `PeftWords.read`.
    """
    found = words.read(described, tensors)
    config = SubspaceConfig(
        method=words.method,
        rank=found.rank,
        alpha=found.alpha,
        dropout=found.dropout,
        target_modules=tuple(found.layers) or None,
        modules_to_save=tuple(saved),
        constraint=found.constraint,
        constraint_weight=found.constraint_weight,
        options=found.options,
        rank_pattern=found.rank_pattern,
        alpha_pattern=found.alpha_pattern,
    )
    own = {file_key(name, suffix): t for name, held in found.layers.items() for suffix, t in held.items()}
    others = {key: tensor for held in saved.values() for key, tensor in held.items()}
    return Imported(
        config,
        {key: tensor.float() for key, tensor in {**own, **others, **found.whole}.items()},
        {name: value for name, value in described.items() if name not in found.outdated},
        found.shapes,
        found.made_from_base,
        copies,
    )
