"""The load itself, from file to forward: every tensor of a checkpoint read once, held in its storage, put in its place.

Where the placement takes parts, a rank reads and packs its own part of a tensor alone (`own_parts.py`). What cannot be read so
is read whole on every rank: a tensor that transformers makes of others, a storage that does not pack by pieces, a placement
that wants the whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dist_subspace.errors import UsageError
from dist_subspace.families.embeddings import input_embeddings, output_embeddings
from dist_subspace.families.experts import stacks_of
from dist_subspace.families.heads import (
    base_prefix,
    is_head_layer,
    is_inside_classification_head,
    is_inside_head,
    is_inside_pooler,
)
from dist_subspace.loading.experts_internals import call_stacks
from dist_subspace.loading.float16 import Float16Range, TooLarge, earliest
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.loading.own_parts import OwnParts
from dist_subspace.loading.packed_head import packed_head
from dist_subspace.loading.ranges import FLOATS, RangeReader
from dist_subspace.loading.sources import find_sources
from dist_subspace.loading.stays_dense import check_packed
from dist_subspace.loading.transformers_internals import initialise, kept_type
from dist_subspace.module_places import buffers_of, replace_everywhere
from dist_subspace.notices import say
from dist_subspace.placement.collectives import gather_objects
from dist_subspace.placement.protocol import Splitter
from dist_subspace.storage import (
    FrozenLinear,
    Origin,
    PackedLinear,
    adopt,
    is_conv1d,
    is_linear,
    left_alone,
    linear_shape,
    pack,
    pack_stack,
    replace,
    storage_info,
)

QUANTISABLE = (torch.float32, torch.bfloat16, torch.float16)  # what every storage packs


class Stream:
    """The plan of a load, checked in full (every name, every shape) before the first tensor is read, and its execution."""

    def __init__(
        self,
        model: PreTrainedModel,
        index: CheckpointIndex,
        storage: str,
        options: Mapping[str, Any],
        dtype: torch.dtype,
        seed: int,
        head: tuple[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """head: the storage of a language model's head, and its options; None for the type of the computation."""
        self.model, self.index = model, index
        self.storage, self.options = storage, options
        self.dtype, self.seed = dtype, seed
        self.operators: dict[nn.Module, nn.Module] = {}  # by the linear layer in whose place each one stands
        self.sources = find_sources(model, index, self._is_head)
        self.kept_type = kept_type(model, dtype)
        self.apart = left_alone(model)
        self.head = None if head is None else (packed_head(model, head[0], self.apart), *head)
        self.own: OwnParts | None = None
        self.too_large: TooLarge | None = None
        self.read_whole: list[str] = []  # by every rank, although they are split
        self._number = 0
        if storage_info(storage).dtype is None:
            modules = dict(model.named_modules())
            packed = [n for n, m in modules.items() if self._packs(n, m) or self._packed_stacks(n, m)]
            apart = {name: why for name, why in self.apart.items() if not self._is_output_layer(name)}
            for sentence in check_packed(model, storage, dtype, packed, apart):
                say(sentence)

    def run(self, device: torch.device, splitter: Splitter | None, progress: Callable[[int, int], None] | None) -> None:
        """Read, pack and place; without collectives, though every rank must come here, and to `finish` after it."""
        done: dict[nn.Parameter, nn.Parameter] = {}
        with RangeReader(self.index) as reader:
            if splitter is not None and splitter.takes_parts:
                self.own = OwnParts(reader, splitter)
            units = list(self._units())
            sizes = self._sizes(units)
            total = sum(sizes)
            for (name, module), done_bytes in zip(units, accumulate(sizes), strict=True):
                try:
                    self._load(name, module, device, splitter, done)
                except TooLarge as error:
                    if self.own is None:
                        raise
                    self.too_large = error  # another rank may see a larger value of it, or none
                    return
                if progress is not None:
                    progress(done_bytes, total)
        replace_everywhere(self.model, self.operators)
        for name, buffer in list(self.model.named_buffers()):
            self._set_buffer(name, buffer, device)

    def finish(self) -> None:
        """Collective where weights were read in parts: what needs the parts of all ranks.

        Raises:
            UsageError: on every rank, a value that float16 cannot hold in one rank's part.
        """
        if self.own is None:
            return
        refused = earliest(gather_objects(self.too_large))
        if refused is not None:
            raise refused
        self.own.finish()

    def share_read_whole(self) -> float:
        """Of the checkpoint's bytes, how many every rank has read although it keeps a part."""
        keys = {key for name in self.read_whole for key in self.sources.keys_of(name)}
        return sum(map(self.index.size, keys)) / max(1, sum(map(self.index.size, self.index)))

    def _sizes(self, units: list[tuple[str, nn.Module]]) -> list[int]:
        """Bytes of the checkpoint that each module is read from; those of a tied parameter, or of several modules, once."""
        counted: set[str] = set()
        sizes = []
        for name, module in units:
            keys = {
                key
                for attribute, _ in module.named_parameters(recurse=False)
                for key in self.sources.keys_of(f"{name}.{attribute}" if name else attribute)
            }
            sizes.append(sum(self.index.size(key) for key in keys - counted))
            counted |= keys
        return sizes

    def fresh_modules(self) -> tuple[str, ...]:
        """The modules whose parameters the checkpoint lacks, and may lack."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.sources.absent if self._is_head(name)))

    def _units(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in list(self.model.named_modules()):
            if any(True for _ in module.parameters(recurse=False)):
                yield name, module

    def _is_head(self, name: str) -> bool:
        """Whether a checkpoint may lack the parameter: a head for a new task is trained anew. A language model's output
        layer is no such head: without it the model says nothing."""
        if is_inside_pooler(name):
            return True
        if output_embeddings(self.model) is not None:
            return False
        prefix = base_prefix(self.model)
        return is_inside_head(name) or (bool(prefix) and not name.startswith(f"{prefix}."))

    def _load(
        self,
        name: str,
        module: nn.Module,
        device: torch.device,
        splitter: Splitter | None,
        done: dict[nn.Parameter, nn.Parameter],
    ) -> None:
        if is_linear(module) and name not in self.apart:
            loaded: nn.Module = self._load_linear(name, module, device, done)
            replace(self.model, name, loaded)
            self.operators[module] = loaded
        else:
            self._load_stacks(name, module, device, splitter)
            self._load_parameters(name, module, device, done)
            loaded = module
        if splitter is not None:
            for parameter in loaded.parameters(recurse=False):
                splitter.place(parameter)

    def _load_linear(
        self, name: str, module: nn.Module, device: torch.device, done: dict[nn.Parameter, nn.Parameter]
    ) -> FrozenLinear:
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        bias = getattr(module, "bias", None)
        ready = None if bias is None else self._parameter(f"{name}.bias", bias, device, done)
        full_name = f"{name}.weight"
        origin = self.sources.origin(self.model, full_name)
        if not self._packs(name, module):
            module.weight = self._parameter(full_name, weight, device, done)
            module.bias = ready  # type: ignore[assignment]
            return self._adopted(module, origin)
        packed = self._packed(full_name, module, device, ready, origin)
        if isinstance(packed, PackedLinear):
            packed.name, packed.compute_dtype = name, self.dtype
        return packed

    def _packed(
        self,
        name: str,
        module: nn.Module,
        device: torch.device,
        bias: nn.Parameter | None,
        origin: Origin | None,
    ) -> FrozenLinear:
        """The weight of a linear layer in the storage, from this rank's part of the file where that is enough."""
        transposed = is_conv1d(module)
        storage, options = self._held_in(name)
        in_pieces = storage_info(storage).in_pieces
        with self._watched(name, self.dtype) as watch:
            if in_pieces is not None and self._in_parts(name):
                assert self.own is not None
                pieces = in_pieces(linear_shape(module), transposed, **options)
                key = self.sources.keys[name]
                packed = self.own.linear(key, pieces, transposed, lambda v: watch(_quantisable(v)), bias, origin)
                packed.conv1d = transposed
                return packed
            full = watch(_quantisable(self._read_float(name)))
        return pack(full.to(device), storage, transposed=transposed, bias=bias, origin=origin, **options)

    def _held_in(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """The storage of a weight that is packed, and its options."""
        if self.head is not None and name == f"{self.head[0]}.weight":
            return self.head[1:]
        return self.storage, self.options

    def _in_parts(self, name: str) -> bool:
        """Whether this rank's part of the parameter is one of a tensor of the file."""
        if self.own is None:
            return False
        if name in self.sources.keys:
            return self.index.types[self.sources.keys[name]] in FLOATS
        if self.sources.has(name):
            self.read_whole.append(name)
        return False

    @contextmanager
    def _watched(self, name: str, dtype: torch.dtype) -> Iterator[Float16Range]:
        """Within the block values of a weight are shown to what is yielded; TooLarge after it if the type cannot hold one."""
        watch = Float16Range(dtype)
        self._number += 1
        yield watch
        if watch.overflows:
            raise TooLarge(str(self.index.folder), name, watch.largest, self._number)

    def _packs(self, name: str, module: nn.Module) -> bool:
        """Whether the storage holds the module's weight: it is a linear layer that is read from the file, no head, and of no type
        of its own (a router made in float32)."""
        full_name = f"{name}.weight"
        if not is_linear(module) or name in self.apart or not self.sources.has(full_name):
            return False
        own_type = self.kept_type(full_name) is not None or module.weight.dtype != self.dtype
        has_own_storage = self.head is not None and name == self.head[0]
        return not own_type and (has_own_storage or not self._is_output_layer(name))

    def _load_stacks(self, name: str, module: nn.Module, device: torch.device, splitter: Splitter | None) -> None:
        """Pack the stacks of a mixture's experts that the storage holds, and put each in its parameter's place."""
        stacks = self._packed_stacks(name, module)
        for attribute, transposed in stacks.items():
            full_name = f"{name}.{attribute}"
            with self._watched(full_name, self.dtype) as watch:
                full = watch(_quantisable(self._read_float(full_name)))
            if self.own is not None:
                self.read_whole.append(full_name)
            stack = pack_stack(
                full,
                self.storage,
                transposed=transposed,
                origin=self.sources.origin(self.model, full_name),
                name=full_name,
                compute_dtype=self.dtype,
                device=device,
                **self.options,
            )
            delattr(module, attribute)  # a module cannot take a parameter's place
            setattr(module, attribute, stack)
            for parameter in stack.parameters() if splitter is not None else ():
                splitter.place(parameter)  # type: ignore[union-attr]
        if stacks:
            call_stacks(module)

    def _packed_stacks(self, name: str, module: nn.Module) -> dict[str, bool]:
        """The module's stacks of experts that the storage holds, by attribute, and whether they are transposed: those of the
        type of the computation, in a storage that is no float type."""
        stacks = stacks_of(module) if storage_info(self.storage).dtype is None else None
        if stacks is None:
            return {}
        held = {attribute: getattr(module, attribute) for attribute in stacks.names}
        return {
            attribute: stacks.transposed
            for attribute, matrices in held.items()
            if self._packs_parameter(f"{name}.{attribute}", matrices)
        }

    def _packs_parameter(self, name: str, matrices: nn.Parameter) -> bool:
        own_type = self.kept_type(name) is not None or matrices.dtype != self.dtype
        return self.sources.has(name) and not own_type and matrices.dim() == 3

    def _is_output_layer(self, name: str) -> bool:
        return self._is_output(name, self.model.get_submodule(name).weight)  # type: ignore[arg-type]

    @staticmethod
    def _adopted(module: nn.Module, origin: Origin | None) -> FrozenLinear:
        operator = adopt(module)
        assert operator is not None  # only linear layers come here
        operator.origin = origin
        return operator

    def _is_output(self, name: str, weight: nn.Parameter) -> bool:
        """Whether it is a head's weight, or one that is tied to an embedding: these stay in the type of the computation."""
        if is_inside_classification_head(name):
            return True
        head = output_embeddings(self.model)
        inputs = input_embeddings(self.model)
        tied = inputs is not None and getattr(inputs, "weight", None) is weight
        return tied or is_head_layer(name) or (head is not None and getattr(head, "weight", None) is weight)

    def _load_parameters(
        self, name: str, module: nn.Module, device: torch.device, done: dict[nn.Parameter, nn.Parameter]
    ) -> None:
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{name}.{attribute}" if name else attribute
            setattr(module, attribute, self._parameter(full_name, parameter, device, done))

    def _parameter(
        self, name: str, old: nn.Parameter, device: torch.device, done: dict[nn.Parameter, nn.Parameter]
    ) -> nn.Parameter:
        """The real parameter in the place of a meta one; tied ones become one object."""
        if old in done:
            return done[old]
        if not old.is_meta:
            old.data = old.data.to(device)
            old.requires_grad_(False)
            return old
        kind = self.kept_type(name) or old.dtype
        with self._watched(name, kind) as watch:
            if old.is_floating_point() and self._in_parts(name):
                assert self.own is not None
                parameter = self.own.parameter(self.sources.keys[name], tuple(old.shape), kind, watch)
            else:
                value = watch(self._whole(name, old))
                parameter = nn.Parameter(value.to(device=device, dtype=kind), requires_grad=False)
        # Keyed by the parameters themselves and not by their ids: an id is used again once its owner is gone.
        done[old] = parameter
        done[parameter] = parameter
        return parameter

    def _whole(self, name: str, old: nn.Parameter) -> torch.Tensor:
        if not self.sources.has(name):
            return self._fresh(name, old)
        return self._read_float(name) if old.is_floating_point() else self.sources.read(self.model, name)

    def _read_float(self, name: str) -> torch.Tensor:
        """A weight as the file holds it; integers are codes of some quantisation, whose scales are not here."""
        value = self.sources.read(self.model, name)
        if not value.dtype.is_floating_point:
            raise UsageError(f"{self.index.folder} holds {name} as {value.dtype}; accepted: a floating-point weight")
        return value

    def _fresh(self, name: str, old: nn.Parameter) -> torch.Tensor:
        """Initial values of a parameter that the checkpoint lacks: the family's own, a function of (seed, name)."""
        owner_name, _, attribute = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        for other, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(owner, other, nn.Parameter(torch.zeros(parameter.shape, dtype=old.dtype), requires_grad=False))
        initialise(self.model, owner, self.seed + zlib.crc32(owner_name.encode()))
        return getattr(owner, attribute).detach()

    def _set_buffer(self, name: str, buffer: torch.Tensor, device: torch.device) -> None:
        owner, _, attribute = name.rpartition(".")
        value = self.sources.read(self.model, name) if self.sources.has(name) else buffer
        kind = self.kept_type(name) if self.sources.has(name) else None
        buffers_of(self.model.get_submodule(owner))[attribute] = value.to(device=device, dtype=kind or buffer.dtype)


def _quantisable(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype in QUANTISABLE else values.float()
