"""An adapter that was read, ours or PEFT's, and whether a model fits it. Local."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.interchange.fitting import check_fits, stack_in
from dist_subspace.interchange.for_class import named_by
from dist_subspace.interchange.model_card import PEFT_TASKS
from dist_subspace.interchange.model_description import task_of_class
from dist_subspace.interchange.peft.experts import PAIR, turned_pair
from dist_subspace.interchange.tensor_names import file_key
from dist_subspace.subspace import SubspaceConfig
from dist_subspace.subspace.core.peft_words import Shapes

Copies = Mapping[str, Mapping[str, Any]]  # the base's parameter -> its shape, and values evenly spaced over it


@dataclass(frozen=True)
class LoadedAdapter:
    """config: of our method. tensors: by our file's keys. described: the adapter_config.json. shapes: `(d_out, d_in)` of the
    layers, None for a side that the tensors do not tell. made_from_base: the entry that says that a part of the adapter must
    be made from the base again; None where the file holds all. copies: of the base's own parameters, which must be the
    model's. layers: that an adapter of ours has, linear or not. stacks: of experts, that an adapter of PEFT has."""

    config: SubspaceConfig
    tensors: dict[str, Tensor]
    described: Mapping[str, Any]
    shapes: Shapes = field(default_factory=dict)
    made_from_base: str | None = None
    copies: Copies = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()

    @property
    def task(self) -> str | None:
        """Our name of the task, or that of the class that PEFT names where it has no task; None where it says neither."""
        task, mapping = self.described.get("task_type"), self.described.get("auto_mapping") or {}
        if task is not None:
            return next((ours for theirs, (_, ours) in PEFT_TASKS.items() if theirs == task), "base")
        return task_of_class(str(mapping["base_model_class"])) if mapping.get("base_model_class") else None

    def named_by(self, model: nn.Module) -> LoadedAdapter:
        """With the names that a text model of a larger family has, where it has those of the whole."""
        config, tensors, known = named_by(model, self.config, self.tensors, dict.fromkeys(self.layers) | self.shapes)
        shapes = {layer: shape for layer, shape in known.items() if shape is not None}
        return replace(self, config=config, tensors=tensors, shapes=shapes, layers=tuple(known) if self.layers else ())

    def laid_out_for(self, model: nn.Module) -> LoadedAdapter:
        """With the factors of PEFT's stacks as this model's layout has them.

        Raises:
            UsageError: the model has no such experts, or has them in other numbers or sizes.
        """
        tensors = dict(self.tensors)
        for name in self.stacks:
            a, b = (tensors[file_key(name, suffix)] for suffix in PAIR)
            turned, shape = stack_in(model, name)
            a, b = turned_pair(a, b) if turned else (a, b)
            if (len(a), b.shape[1], a.shape[2]) != shape:
                raise UsageError(
                    f"the adapter is for {len(a)} experts {name} of {b.shape[1]} x {a.shape[2]}, but this model's are "
                    f"{shape[0]} of {shape[1]} x {shape[2]}: it belongs to another base model"
                )
            tensors |= {file_key(name, suffix): t.contiguous() for suffix, t in zip(PAIR, (a, b), strict=True)}
        return replace(self, tensors=tensors)

    def check(self, model: nn.Module) -> None:
        """Raises UsageError for a model that the adapter does not fit; the model is only looked at."""
        check_fits(model, self.config, self.tensors, self.described, self.shapes)
