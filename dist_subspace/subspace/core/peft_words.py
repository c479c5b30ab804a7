"""What PEFT (huggingface/peft) says of a method, in one optional class at the end of the method's file.

Export asks it what stands in adapter_config.json and whether PEFT computes the same. Import asks it what an adapter that PEFT
wrote is as one of the method. Both go by files alone; nothing here is collective.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.subspace.core.spec import Settings

PREFIX = "base_model.model."  # how the names of a layer's tensors begin in an adapter's file

Entries = Mapping[str, Any]  # of an adapter_config.json
Layers = dict[str, dict[str, Tensor]]  # tensors by layer and suffix
# `(d_out, d_in)` by layer; None for a side that the tensors do not tell
Shapes = dict[str, tuple[int | None, int | None]]
P = TypeVar("P", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class FromPeft:
    """An adapter that PEFT wrote, as one of a method.

    layers: the tensors of each layer, under our suffixes; whole: tensors of no layer, under their whole names; shapes: of the
    layers. rank to constraint_weight: as in `SubspaceConfig`. made_from_base: the entry that says that a part of the adapter
    must be made from the base again; None where the file holds all. outdated: entries that are not true of these tensors.
    """

    layers: Layers = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    options: Entries = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    constraint: str | None = None
    constraint_weight: float = 0.1
    made_from_base: str | None = None
    outdated: tuple[str, ...] = ()


class PeftWords(Generic[P]):
    """The words of one method, whose parts are of class P.

    peft_type: PEFT's name of what it makes of the method.
    writes: whether the method's own files are files that PEFT reads; else its words are there for import alone.
    on_conv1d: whether PEFT puts its layers on Conv1D too, and its configuration has `fan_in_fan_out`.
    has_patterns: whether PEFT gives single layers another rank or alpha.
    on_experts: whether PEFT has it on stacks of experts too (`target_parameters`).
    tensor_prefix: how the names of its tensors begin, after the layer's.
    suffixes: the tensors of a layer, as PEFT writes them, now or earlier -> as our parts call them.
    spelling: suffixes of our parts -> as our files spell them, where that differs.
    defaults: entries that are read, with what PEFT takes for one that is missing; more_entries: others that are read.
    without_effect: entries that change nothing about a finished adapter.
    module_lists: entries that list modules by name, beside `target_modules` and `modules_to_save`.
    """

    method: str  # its name, set where it is registered
    peft_type: ClassVar[str]
    writes: ClassVar[bool] = True
    on_conv1d: ClassVar[bool] = True
    has_patterns: ClassVar[bool] = False
    on_experts: ClassVar[bool] = False
    tensor_prefix: ClassVar[str]
    suffixes: ClassVar[Mapping[str, str]] = {}
    spelling: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Entries] = {}
    more_entries: ClassVar[tuple[str, ...]] = ()
    without_effect: ClassVar[tuple[str, ...]] = ()
    module_lists: ClassVar[tuple[str, ...]] = ()

    # Export.

    def entries(self, settings: Settings) -> dict[str, Any]:
        """The entries of adapter_config.json that the settings decide."""
        return {}

    def model_entries(self, part: P) -> dict[str, Any]:
        """The entries that depend on the model that the part stands in."""
        return {}

    def agrees(self, part: P) -> bool:
        """Whether PEFT computes the same from this part's own file as the part does."""
        return True

    # Import.

    def claims(self, described: Entries) -> bool:
        """Whether an adapter is one of this method. Where several methods claim it, the words of the most special class have
        it: a subclass comes before its base class."""
        return bool(described.get("peft_type") == self.peft_type)

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        """An adapter that PEFT wrote, as one of this method.

        Arguments:
            described: its adapter_config.json, with `defaults` for what is missing.
            tensors: the method's own, under the file's names.

        Raises:
            UsageError: what it computes is not known here, or its tensors contradict its configuration.
        """
        raise TypeError(f"{type(self).__name__} does not say how an adapter of PEFT is read")

    @property
    def known_entries(self) -> set[str]:
        return {*self.defaults, *self.more_entries, *self.without_effect}

    def by_layer(self, tensors: Mapping[str, Tensor]) -> Layers:
        """The tensors of each layer under our suffixes.

        Raises:
            UsageError: a tensor that is none of `suffixes`, a layer that lacks one, or no layer at all.
        """
        layers: Layers = {}
        for key, tensor in tensors.items():
            suffix = next((s for s in self.suffixes if key.startswith(PREFIX) and key.endswith(f".{s}")), None)
            if suffix is None:
                raise UsageError(
                    f"the {self.peft_type} adapter holds {key}, which is not known here; accepted: of linear layers, "
                    f"{', '.join(self.suffixes)}"
                )
            layer = key.removeprefix(PREFIX).removesuffix(f".{suffix}")
            layers.setdefault(layer, {})[self.suffixes[suffix]] = tensor
        for name, held in layers.items():
            missing = set(self.suffixes.values()) - held.keys()
            if missing:
                raise UsageError(f"the {self.peft_type} adapter lacks {min(missing)} of {name}; it was not saved whole")
        if not layers:
            raise UsageError(f"the {self.peft_type} adapter holds no tensors of any layer")
        return layers


def by_pattern(pattern: Mapping[str, T] | None, usual: T, layers: Iterable[str]) -> dict[str, T]:
    """Each layer's value of a `rank_pattern` or `alpha_pattern`: that of the first key that the whole of a name, or its end,
    matches; else the usual one. A key that matches no layer means nothing, as in PEFT."""
    pattern = pattern or {}
    keys = {name: pattern_key(pattern, name) for name in layers}
    return {name: usual if key is None else pattern[key] for name, key in keys.items()}


def pattern_key(pattern: Iterable[str], name: str) -> str | None:
    """The first key of a `rank_pattern` or `alpha_pattern` that the whole of a name, or its end, matches."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)
