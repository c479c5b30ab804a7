"""The load itself, from file to forward: every tensor of a checkpoint read once, held in its storage, put in its place.

A rank reads and packs its own part of a tensor alone (`own_parts.py`), which is the whole where it loads alone. What cannot be
read so is read whole by every rank: a tensor that transformers makes of others in another way than by putting them together, a
storage that does not pack by pieces, a placement that wants the whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dist_subspace.errors import UsageError
from dist_subspace.loading.as_held import Place
from dist_subspace.loading.experts_internals import call_stacks
from dist_subspace.loading.float16 import Float16Range, TooLarge, earliest
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.own_parts import OwnParts
from dist_subspace.loading.packing import Packing
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.loading.sources import find_sources
from dist_subspace.loading.stays_dense import may_lack
from dist_subspace.loading.transformers_internals import KeyPlan, initialise
from dist_subspace.module_places import buffers_of, replace_everywhere
from dist_subspace.placement.protocol import Splitter
from dist_subspace.storage import (
    FrozenLinear,
    FrozenStack,
    Origin,
    PackedLinear,
    adopt,
    is_conv1d,
    is_linear,
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
        plan: KeyPlan,
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
        self.sources = find_sources(model, index, plan, partial(may_lack, model))
        self.packing = Packing(model, index, self.sources, (storage, options), dtype, head)
        self.kept_type, self.quantised = self.packing.kept_type, self.packing.quantised
        self.own: OwnParts | None = None
        self.too_large: TooLarge | None = None
        self.read_whole: list[str] = []  # by every rank, although they are split
        self._number = 0
        self.packing.say_what_stays()

    def run(self, splitter: Splitter, progress: Callable[[int, int], None] | None) -> None:
        """Read, pack and place; without collectives, though every rank must come here, and to `finish` after it."""
        self.splitter = splitter
        units = list(self._units())
        sizes = self.sources.sizes(units)
        count = _counting(sum(sizes), progress)
        with RangeReader(self.index) as reader:
            self.reader = reader
            if splitter.takes_parts:
                self.own = OwnParts(reader, splitter)
            try:
                self._put_together(units, sizes, count)
                if self.own is not None:
                    self.own.run(count)
            except TooLarge as error:
                if self.own is None:
                    raise
                self.too_large = error  # another rank may see a larger value of it, or none
                return
        replace_everywhere(self.model, self.operators)
        for name, buffer in list(self.model.named_buffers()):
            self._set_buffer(name, buffer, splitter.device)

    def _put_together(self, units: list[tuple[str, nn.Module]], sizes: list[int], count: Callable[[int], None]) -> None:
        """Make every operator and parameter; those that can be read in parts are empty yet."""
        done: dict[nn.Parameter, nn.Parameter] = {}
        for (name, module), size in zip(units, sizes, strict=True):
            planned = 0 if self.own is None else len(self.own.jobs)
            self._load(name, module, self.splitter.device, done)
            jobs = [] if self.own is None else self.own.jobs[planned:]
            entries = sum(job.layout.numel for job in jobs)
            for job in jobs:
                job.size = size * job.layout.numel // max(1, entries)
            count(size - sum(job.size for job in jobs))

    def finish(self) -> None:
        """Collective where several ranks load the model: what needs the parts of all.

        Raises:
            UsageError: on every rank, a value that float16 cannot hold in one rank's part.
        """
        if self.own is None:
            return
        refused = earliest(self.splitter.of_all(self.too_large))
        if refused is not None:
            raise refused
        self.own.finish()

    def share_read_whole(self) -> float:
        """Of the checkpoint's bytes, how many every rank has read although it could do with a part."""
        return self.sources.share(self.read_whole)

    def fresh_modules(self) -> tuple[str, ...]:
        """The modules whose parameters the checkpoint lacks, and may lack."""
        return tuple(
            dict.fromkeys(name.rpartition(".")[0] for name in self.sources.absent if may_lack(self.model, name))
        )

    def _units(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in list(self.model.named_modules()):
            if any(True for _ in module.parameters(recurse=False)):
                yield name, module

    def _load(
        self,
        name: str,
        module: nn.Module,
        device: torch.device,
        done: dict[nn.Parameter, nn.Parameter],
    ) -> None:
        if is_linear(module) and name not in self.packing.apart:
            loaded: nn.Module = self._load_linear(name, module, device, done)
            replace(self.model, name, loaded)
            self.operators[module] = loaded
        else:
            self._load_stacks(name, module, device)
            self._load_parameters(name, module, device, done)
            loaded = module
        for parameter in loaded.parameters(recurse=False):
            self.splitter.place(parameter)

    def _load_linear(
        self, name: str, module: nn.Module, device: torch.device, done: dict[nn.Parameter, nn.Parameter]
    ) -> FrozenLinear:
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        bias = getattr(module, "bias", None)
        ready = None if bias is None else self._parameter(f"{name}.bias", bias, device, done)
        full_name = f"{name}.weight"
        origin = self.sources.origin(self.model, full_name)
        if not self.packing.packs(name, module):
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
        storage, options = self.packing.held_in(name)
        in_pieces, layout = storage_info(storage).in_pieces, self._layout(name)
        watch, end = self._watch(name, self.dtype)
        if self.packing.takes_codes(name):
            place, key = Place(self.own, self.reader, device), self.sources.keys[name]
            packed = self.quantised.operator(key, linear_shape(module), place, watch, end, bias=bias, origin=origin)
            packed.conv1d = transposed
            return packed
        if in_pieces is not None and layout is not None:
            assert self.own is not None
            pieces = in_pieces(linear_shape(module), transposed, **options)
            packed = self.own.linear(layout, pieces, transposed, lambda v: watch(_quantisable(v)), end, bias, origin)
            packed.conv1d = transposed
            return packed
        full = watch(_quantisable(self._read_float(name)))
        end()
        return pack(full.to(device), storage, transposed=transposed, bias=bias, origin=origin, **options)

    def _layout(self, name: str) -> Layout | None:
        """Where this rank's part of the parameter lies in the file; None where it is read whole."""
        if self.own is None or not self.sources.has(name):
            return None
        layout = self.sources.layout(name)
        if layout is None:
            self.read_whole.append(name)
        return layout

    def _watch(self, name: str, dtype: torch.dtype) -> tuple[Float16Range, Callable[[], None]]:
        """What is shown the values of a weight, and what is called after the last: TooLarge if the type cannot hold one."""
        watch = Float16Range(dtype)
        self._number += 1
        number = self._number

        def end() -> None:
            if watch.overflows:
                raise TooLarge(str(self.index.folder), name, watch.largest, number)

        return watch, end

    def _load_stacks(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Pack the stacks of a mixture's experts that the storage holds, and put each in its parameter's place."""
        stacks = self.packing.stacks(name, module)
        for attribute, transposed in stacks.items():
            stack = self._stack(f"{name}.{attribute}", getattr(module, attribute), transposed, device)
            delattr(module, attribute)  # a module cannot take a parameter's place
            setattr(module, attribute, stack)
            for parameter in stack.parameters():
                self.splitter.place(parameter)
        if stacks:
            call_stacks(module)

    def _stack(self, name: str, matrices: nn.Parameter, transposed: bool, device: torch.device) -> FrozenStack:
        origin = self.sources.origin(self.model, name)
        in_pieces, layout = storage_info(self.storage).in_pieces, self._layout(name)
        watch, end = self._watch(name, self.dtype)
        if in_pieces is not None and layout is not None:
            assert self.own is not None
            _, *sides = matrices.shape
            shape = (sides[1], sides[0]) if transposed else (sides[0], sides[1])
            pieces = in_pieces(shape, transposed, **self.options)
            held = self.quantised.stack(layout.transpose(-2, -1) if transposed else layout, transposed)
            stack = self.own.stack(layout, pieces, transposed, lambda v: watch(_quantisable(v)), end, origin, held)
            one = stack.kind[0]
            if isinstance(one, PackedLinear):
                one.name, one.compute_dtype = name, self.dtype
            return stack
        full = watch(_quantisable(self._read_float(name)))
        end()
        return pack_stack(
            full,
            self.storage,
            transposed=transposed,
            origin=origin,
            name=name,
            compute_dtype=self.dtype,
            device=device,
            **self.options,
        )

    @staticmethod
    def _adopted(module: nn.Module, origin: Origin | None) -> FrozenLinear:
        operator = adopt(module)
        assert operator is not None  # only linear layers come here
        operator.origin = origin
        return operator

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
        watch, end = self._watch(name, kind)
        layout = self._layout(name) if old.is_floating_point() else None
        if layout is not None:
            assert self.own is not None
            parameter = self.own.parameter(layout, tuple(old.shape), kind, watch, end)
        else:
            value = watch(self._whole(name, old))
            end()
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


def _counting(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """What is told of more bytes, and tells how many there are in all."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if more and progress is not None:
            progress(done, total)

    return count
