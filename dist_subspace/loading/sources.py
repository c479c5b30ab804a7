"""From which tensors of a checkpoint each parameter of a model comes: the whole plan of a load, made from headers alone.

Every rule is transformers' own: which key is which parameter, which tensors are joined or split, and which parameters are
tied. Only what transformers would get wrong or leave out without a word is decided here, and refused or said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_subspace.errors import UsageError
from dist_subspace.loading.decoded import DecodedIndex
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.ranges import FLOATS
from dist_subspace.loading.traced import Traced, traced
from dist_subspace.loading.transformers_internals import Conversion, KeyPlan, reported_keys, tie, tied_pairs
from dist_subspace.loading.unused import examine
from dist_subspace.storage import Origin

_META_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class ConvertedOrigin(Origin):
    """A matrix that transformers makes of several tensors, or of a part of one; file and key are the first's. read: makes it
    again, on the CPU, in the checkpoint's type."""

    read: Callable[[], Tensor]


@dataclass
class Sources:
    """keys: parameter or buffer -> the key that holds it as it is, tied ones the same. conversions: parameter -> what makes it;
    layouts: of those that are only put together of pieces of the file, where these lie. absent: parameters that the checkpoint
    lacks, and may lack. notes: what is worth saying, one sentence each."""

    index: CheckpointIndex
    keys: dict[str, str]
    conversions: dict[str, Conversion]
    layouts: dict[str, Layout]
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _waiting: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _first_names: dict[str, str] = field(default_factory=dict)  # of tied parameters: the one that the conversion makes

    def has(self, name: str) -> bool:
        return name in self.keys or name in self.conversions

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The tensors of the checkpoint that a parameter is made of."""
        if name in self.keys:
            return (self.keys[name],)
        return tuple(key for _, key in self.conversions[name].sources) if name in self.conversions else ()

    def sizes(self, modules: Iterable[tuple[str, nn.Module]]) -> list[int]:
        """Bytes of the checkpoint that each module is read from; those of a tied parameter, or of several modules, once."""
        counted: set[str] = set()
        sizes = []
        for name, module in modules:
            keys = {
                key
                for attribute, _ in module.named_parameters(recurse=False)
                for key in self.keys_of(f"{name}.{attribute}" if name else attribute)
            }
            sizes.append(sum(self.index.size(key) for key in keys - counted))
            counted |= keys
        return sizes

    def share(self, names: Iterable[str]) -> float:
        """What part of the checkpoint's bytes these parameters are read from."""
        keys = {key for name in names for key in self.keys_of(name)}
        return sum(map(self.index.size, keys)) / max(1, sum(map(self.index.size, self.index)))

    def layout(self, name: str) -> Layout | None:
        """Where the values of a parameter lie, if parts of it can be read: each entry is one of the file, all of one type."""
        if name in self.keys:
            found: Layout | None = self.index.layout(self.keys[name])
        else:
            found = self.layouts.get(self._first_names.get(name, name))
        types = set() if found is None else {self.index.types[key] for key in found.keys}
        return found if len(types) == 1 and types <= FLOATS.keys() else None

    def origin(self, model: PreTrainedModel, name: str) -> Origin | None:
        """Where a matrix can be read again; None for one that the checkpoint lacks."""
        if name in self.keys:
            key = self.keys[name]
            return self._decoded_origin(key) or Origin(str(self.index.files[key]), key)
        if name not in self.conversions:
            return None
        conversion, first_name = self.conversions[name], self._first_names.get(name, name)
        key, config, read = conversion.sources[0][1], model.config, self.index.read
        return ConvertedOrigin(str(self.index.files[key]), key, lambda: conversion.tensors(read, config)[first_name])

    def _decoded_origin(self, key: str) -> Origin | None:
        """Of a weight that the file holds in codes: the numbers that these stand for, in float32."""
        index = self.index
        if not isinstance(index, DecodedIndex) or key not in index.weights:
            return None
        return ConvertedOrigin(str(index.files[key]), key, lambda: index.decode(key, torch.float32))

    def share_source(self, name: str, others: Iterable[str]) -> None:
        """Give parameters that are tied to one that has a source the same source."""
        for other in others:
            if not self.has(other):
                if name in self.keys:
                    self.keys[other] = self.keys[name]
                else:
                    self.conversions[other], self._first_names[other] = self.conversions[name], name

    def read(self, model: PreTrainedModel, name: str) -> Tensor:
        """A parameter's values in the checkpoint's type. What one conversion makes beside it is kept until it is asked for."""
        if name in self.keys:
            return self.index.read(self.keys[name])
        conversion, name = self.conversions[name], self._first_names.get(name, name)
        tensors = self._waiting.pop(id(conversion), None) or conversion.tensors(self.index.read, model.config, model)
        tensor = tensors.pop(name)
        if tensors:
            self._waiting[id(conversion)] = tensors
        return tensor


def find_sources(
    model: PreTrainedModel, index: CheckpointIndex, plan: KeyPlan, may_lack: Callable[[str], bool]
) -> Sources:
    """Plan the load of an empty model, and tie its parameters as the checkpoint asks for.

    Arguments:
        plan: what transformers makes of the checkpoint's keys (`key_plan`).

    Raises:
        UsageError: tensors that are missing, of another shape, or that stand for something the model does not compute.
    """
    notes = [*index.notes, *examine(model, index, plan.unused)]
    keys = {name: _agreeing_key(index, name, candidates) for name, candidates in plan.direct.items()}
    conversions: dict[str, Conversion] = {}
    layouts: dict[str, Layout] = {}
    shapes = {name: index.shapes[key] for name, key in keys.items()}
    for conversion in plan.conversions:
        tensors = _followed(model, index, conversion) or _dry_run(model, index, conversion)
        for name, tensor in tensors.items():
            if name in keys:
                raise _contradiction(index, name, keys[name], conversion.sources[0][1])
            conversions[name], shapes[name] = conversion, tuple(tensor.shape)
            if isinstance(tensor, Traced) and tensor.layout_in_file.is_in_runs:
                layouts[name] = tensor.layout_in_file
    _check_shapes(model, index, keys, conversions, shapes)
    sources = Sources(index, keys, conversions, layouts, notes=notes)
    _tie(model, sources)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    missing = [name for name in parameters if not sources.has(name)]
    lost, _ = reported_keys(model, [name for name in missing if not may_lack(name)], ())
    if lost:
        raise UsageError(_lacks(index, [name for name in missing if name in lost], plan.unused, model))
    sources.absent = missing
    return sources


def _agreeing_key(index: CheckpointIndex, name: str, keys: list[str]) -> str:
    """The one key of a parameter. Several keys must hold the same values (UsageError): nobody knows which is meant otherwise."""
    for other in keys[1:]:
        if not index.same(keys[0], other, torch.float32):
            raise _contradiction(index, name, keys[0], other)
    return keys[0]


def _contradiction(index: CheckpointIndex, name: str, one: str, other: str) -> UsageError:
    return UsageError(
        f"model.path is {str(index.folder)!r}, which holds {one} and {other} with different values, and both are the model's "
        f"{name}; remove the one that is not meant"
    )


def _followed(model: PreTrainedModel, index: CheckpointIndex, conversion: Conversion) -> dict[str, Tensor]:
    """What a conversion makes, with where the values come from; empty where it does more than put tensors together.

    Raises:
        UsageError: for codes among floats, which would be joined to them as if they were numbers.
    """
    kinds = {key: index.types[key] for _, key in conversion.sources}
    if len(set(kinds.values())) > 1:
        codes = next((key for key, kind in kinds.items() if kind not in FLOATS), None)
        if codes is not None and any(kind in FLOATS for kind in kinds.values()):
            raise UsageError(f"{index.folder} holds {codes} as {kinds[codes]}; accepted: a floating-point weight")
        return {}  # their joint is of another type

    def trace(key: str) -> Tensor:
        tensor = traced(key, index.shapes[key], FLOATS.get(index.types[key], torch.float32))
        tensor.layout_in_file = index.layout(key)
        return tensor

    try:
        return conversion.tensors(trace, model.config, model)
    except Exception:  # also whatever an operation makes of tensors that do not fit, which `_dry_run` says
        return {}


def _dry_run(model: PreTrainedModel, index: CheckpointIndex, conversion: Conversion) -> dict[str, Tensor]:
    """What a conversion makes, on the meta device.

    Raises:
        UsageError: for tensors that do not fit together.
    """

    def shape_of(key: str) -> Tensor:
        return torch.empty(index.shapes[key], dtype=_META_TYPES.get(index.types[key], torch.float32), device="meta")

    try:
        return conversion.tensors(shape_of, model.config, model)
    except Exception as error:  # whatever an operation of transformers makes of tensors that do not fit together
        keys = [key for _, key in conversion.sources]
        raise UsageError(
            f"model.path is {str(index.folder)!r}, whose {keys[0]}{f' and {len(keys) - 1} more' if keys[1:] else ''} cannot "
            f"become the model's {conversion.name} ({str(error).strip().splitlines()[0] if str(error).strip() else error!r}); "
            "the checkpoint is incomplete or does not fit config.json"
        ) from error


def _check_shapes(
    model: PreTrainedModel,
    index: CheckpointIndex,
    keys: dict[str, str],
    conversions: dict[str, Conversion],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    for name, tensor in model.state_dict().items():
        if name not in shapes or shapes[name] == tuple(tensor.shape):
            continue
        key = keys.get(name) or conversions[name].sources[0][1]
        made = "" if name in keys else f" (and what belongs to it) for {name}"
        raise UsageError(
            f"{index.files[key].name} holds {key}{made} as {list(shapes[name])}, but config.json asks for {list(tensor.shape)}"
        )


def _tie(model: PreTrainedModel, sources: Sources) -> None:
    """Tie by transformers' rule: of two tied parameters that the checkpoint holds with different values, neither is the other."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for target, source in tied_pairs(model).items():
        if target in sources.keys and source in sources.keys:
            one, other = sources.keys[target], sources.keys[source]
            if one == other or sources.index.same(one, other, held[target].dtype):
                del sources.keys[target]
    tie(model, {name for name in held if not sources.has(name)})
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        first = next((name for name in names if sources.has(name)), None)
        if first is not None:
            sources.share_source(first, names)


def _lacks(index: CheckpointIndex, lost: list[str], unused: Iterable[str], model: PreTrainedModel) -> str:
    instead = list(unused)
    held = ""
    if instead:
        more = f" and {len(instead) - 3} more" if len(instead) > 3 else ""
        held = f"; it holds {', '.join(instead[:3])}{more}, for which {type(model).__name__} has no place"
    return (
        f"model.path is {str(index.folder)!r}, whose weights lack {', '.join(lost[:3])}"
        f"{f' and {len(lost) - 3} more' if len(lost) > 3 else ''}{held}; "
        "the checkpoint is incomplete or of another architecture"
    )
