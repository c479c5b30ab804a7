"""The load itself, from file to forward: every tensor of a checkpoint read once, held in its storage, put in its place.

This is where reading becomes finer: a rank could read its own rows only. What is read, how it is packed and where it goes are
three calls here, so that only the first would change.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
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
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.loading.sources import find_sources
from dist_subspace.loading.stays_dense import check_packed
from dist_subspace.loading.transformers_internals import initialise, kept_type
from dist_subspace.module_places import buffers_of, replace_everywhere
from dist_subspace.notices import say
from dist_subspace.placement.protocol import Splitter
from dist_subspace.storage import (
    FrozenLinear,
    Origin,
    PackedLinear,
    adopt,
    is_conv1d,
    is_linear,
    left_alone,
    pack,
    pack_stack,
    replace,
    storage_info,
)

QUANTISABLE = (torch.float32, torch.bfloat16, torch.float16)  # what every storage packs
WIDER = (torch.float32, torch.bfloat16, torch.float64)  # than float16: types whose values it may not hold


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
    ) -> None:
        self.model, self.index = model, index
        self.storage, self.options = storage, options
        self.dtype, self.seed = dtype, seed
        self.operators: dict[nn.Module, nn.Module] = {}  # by the linear layer in whose place each one stands
        self.sources = find_sources(model, index, self._is_head)
        self.kept_type = kept_type(model, dtype)
        self.apart = left_alone(model)
        if storage_info(storage).dtype is None:
            modules = dict(model.named_modules())
            packed = [n for n, m in modules.items() if self._packs(n, m) or self._packed_stacks(n, m)]
            apart = {name: why for name, why in self.apart.items() if not self._is_output_layer(name)}
            for sentence in check_packed(model, storage, dtype, packed, apart):
                say(sentence)

    def run(self, device: torch.device, splitter: Splitter | None, progress: Callable[[int, int], None] | None) -> None:
        """Read, pack and place; without collectives, though every rank must come here."""
        done: dict[nn.Parameter, nn.Parameter] = {}
        units = list(self._units())
        for number, (name, module) in enumerate(units):
            self._load(name, module, device, splitter, done)
            if progress is not None:
                progress(number + 1, len(units))
        replace_everywhere(self.model, self.operators)
        for name, buffer in list(self.model.named_buffers()):
            self._set_buffer(name, buffer, device)

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
        full = self._read_float(full_name)
        if full.dtype not in QUANTISABLE:
            full = full.float()
        self._refuse_overflow(full_name, full, self.dtype)
        packed = pack(
            full.to(device),
            self.storage,
            transposed=is_conv1d(module),
            bias=ready,
            origin=origin,
            **self.options,
        )
        if isinstance(packed, PackedLinear):
            packed.name, packed.compute_dtype = name, self.dtype
        return packed

    def _packs(self, name: str, module: nn.Module) -> bool:
        """Whether the storage holds the module's weight: it is a linear layer that is read from the file, no head, and of no type
        of its own (a router made in float32)."""
        full_name = f"{name}.weight"
        if not is_linear(module) or name in self.apart or not self.sources.has(full_name):
            return False
        own_type = self.kept_type(full_name) is not None or module.weight.dtype != self.dtype
        return not own_type and not self._is_output_layer(name)

    def _load_stacks(self, name: str, module: nn.Module, device: torch.device, splitter: Splitter | None) -> None:
        """Pack the stacks of a mixture's experts that the storage holds, and put each in its parameter's place."""
        stacks = self._packed_stacks(name, module)
        for attribute, transposed in stacks.items():
            full_name = f"{name}.{attribute}"
            full = self._read_float(full_name)
            if full.dtype not in QUANTISABLE:
                full = full.float()
            self._refuse_overflow(full_name, full, self.dtype)
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
        read = self._read_float if old.is_floating_point() else lambda name: self.sources.read(self.model, name)
        value = read(name) if self.sources.has(name) else self._fresh(name, old)
        kind = self.kept_type(name) or old.dtype
        self._refuse_overflow(name, value, kind)
        parameter = nn.Parameter(value.to(device=device, dtype=kind), requires_grad=False)
        # Keyed by the parameters themselves and not by their ids: an id is used again once its owner is gone.
        done[old] = parameter
        done[parameter] = parameter
        return parameter

    def _read_float(self, name: str) -> torch.Tensor:
        """A weight as the file holds it; integers are codes of some quantisation, whose scales are not here."""
        value = self.sources.read(self.model, name)
        if not value.dtype.is_floating_point:
            raise UsageError(f"{self.index.folder} holds {name} as {value.dtype}; accepted: a floating-point weight")
        return value

    def _refuse_overflow(self, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
        """Refuse (UsageError) a weight above 65,504, where float16 ends: it would be infinite, and what follows no number."""
        if dtype != torch.float16 or value.dtype not in WIDER or not value.numel():
            return
        largest = value.abs().amax()
        if bool(largest.isfinite()) and float(largest) > torch.finfo(dtype).max:
            raise UsageError(
                f"model.path is {str(self.index.folder)!r}, whose {name} has values up to {float(largest):,.0f}, which float16 "
                "cannot hold; accepted for this model: model.dtype bfloat16 or float32"
            )

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
