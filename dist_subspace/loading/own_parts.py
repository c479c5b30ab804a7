"""A rank's own parts of a split model: read from the file, packed and kept, without the rest of any tensor.

Which entries of a shard come from which entries of the file is known before anything is read: a storage says how it packs by
pieces (`storage/pieces.py`), the placement which part a rank keeps, the index where the values lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_subspace.loading.as_held import CHUNK
from dist_subspace.loading.held_weight import AsHeld
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.pages import zeros_in_pages
from dist_subspace.placement.collectives import broadcast_object, summed_over_ranks
from dist_subspace.placement.protocol import Part, Splitter
from dist_subspace.storage import FlatTensor, FrozenLinear, Origin, PieceWise

# Entries that are packed at a time on a CPU: what comes and goes beside them stays in its cache.
PIECE = 1 << 18
Interval = tuple[int, int]
# Is handed each piece of a weight before it is packed; says what the storage gets.
Check = Callable[[Tensor], Tensor]


@dataclass
class HeldTensor:
    """A parameter's parts on this rank, to be written."""

    spec: FlatTensor
    parameter: nn.Parameter
    parts: Sequence[Part]
    memory: Sequence[Tensor]

    def units(self) -> list[Interval]:
        """The units of the matrix that the parts are made of."""
        per = self.spec.per_unit
        return [(part.start // per, -(-part.stop // per)) for part in self.parts if per and part.start < part.stop]

    def write(self, values: Tensor, first: int) -> None:
        """Flat values of the whole, from entry `first` on: what belongs to the parts is kept."""
        for part, memory in zip(self.parts, self.memory, strict=True):
            low, high = max(part.start, first), min(part.stop, first + values.numel())
            if low < high:
                memory[low - part.start : high - part.start].copy_(values[low - first : high - first])


@dataclass
class _Waiting:
    """An operator whose statistics are packed once they are whole: this rank's entries of them, and where these begin."""

    operator: FrozenLinear
    pieces: PieceWise
    late: Mapping[str, HeldTensor]
    begin: int
    own: Tensor


@dataclass
class OwnParts:
    """Reads and places; local, but for `finish`."""

    reader: RangeReader
    splitter: Splitter
    _waiting: list[_Waiting] = field(default_factory=list)

    def parameter(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, check: Check) -> nn.Parameter:
        """A tensor of the file as a split parameter of another type."""
        held = self._hold(FlatTensor(shape, dtype, 1))
        for start, stop in _joined(held.units()):
            for first, values in self.reader.entries(key, start, stop, 1):
                held.write(check(values).to(dtype), first)
        return held.parameter

    def linear(
        self, key: str, pieces: PieceWise, transposed: bool, check: Check, bias: Tensor | None, origin: Origin | None
    ) -> FrozenLinear:
        """A matrix of the file, which holds `(d_in, d_out)` where `transposed`, in a storage."""
        held = {name: self._hold(spec) for name, spec in pieces.tensors.items()}
        late = {name: self._hold(spec) for name, spec in pieces.late.items()}
        own, begin = self._own_statistic(pieces, held)
        device, read = self.splitter.device, self.reader.entries
        if transposed and not pieces.as_given:
            read = self.reader.transposed_entries
        numel = pieces.shape[0] * pieces.shape[1]
        for low, high in _joined([units for tensor in held.values() for units in tensor.units()]):
            for first, chunk in read(key, low * pieces.unit, min(high * pieces.unit, numel), pieces.unit):
                for offset, piece in _cut(check(chunk.to(device)), pieces.unit):
                    unit = (first + offset) // pieces.unit
                    packed = pieces.pack(piece)
                    for name, tensor in held.items():
                        tensor.write(packed[name], unit * tensor.spec.per_unit)
                    if pieces.statistic is not None:
                        _write_own(own, begin, packed[pieces.STATISTIC], unit * pieces.statistic.per_unit)
        parameters = {name: tensor.parameter for name, tensor in {**held, **late}.items()}
        operator = pieces.operator(parameters, bias=bias, origin=origin)
        if pieces.statistic is not None:
            self._waiting.append(_Waiting(operator, pieces, late, begin, own))
        return operator

    def copied(self, as_held: AsHeld, pieces: PieceWise) -> dict[str, nn.Parameter]:
        """The tensors of an operator that are bytes of the file as they are."""
        held = {name: self._hold(spec) for name, spec in {**pieces.tensors, **pieces.late}.items()}
        for name, tensor in held.items():
            for start, stop in _joined([(part.start, part.stop) for part in tensor.parts if part.start < part.stop]):
                for first in range(start, stop, CHUNK):
                    read = as_held.tensors[name](self.reader.bytes, first, min(first + CHUNK, stop))
                    tensor.write(read, first)
        return {name: tensor.parameter for name, tensor in held.items()}

    def finish(self) -> None:
        """Collective: pack what needs the statistics of whole matrices."""
        while self._waiting:
            one = self._waiting.pop(0)
            assert one.pieces.statistic is not None
            whole = torch.zeros(one.pieces.statistic.shape, dtype=one.pieces.statistic.dtype, device=one.own.device)
            whole[one.begin : one.begin + one.own.numel()] = one.own
            whole = summed_over_ranks(whole)  # each entry is one rank's, and zero elsewhere: nothing is rounded
            # The mean of many numbers depends on the number of threads: all ranks take the first one's.
            values = broadcast_object(one.pieces.plain_values(whole))
            for name, tensor in one.pieces.late_tensors(whole, values).items():
                one.late[name].write(tensor, 0)
            one.operator.set_plain_values(values)

    def _hold(self, spec: FlatTensor) -> HeldTensor:
        parts = self.splitter.parts(spec.numel)
        memory = [self.splitter.zeros(part.length, spec.dtype) for part in parts]
        parameter = self.splitter.placeholder(spec.shape, spec.dtype)
        self.splitter.place_parts(parameter, memory)
        return HeldTensor(spec, parameter, parts, memory)

    def _own_statistic(self, pieces: PieceWise, held: Mapping[str, HeldTensor]) -> tuple[Tensor, int]:
        """Memory for the statistics that this rank tells the others, and where they begin: those of the units whose first entry
        of the first tensor is in its part. Every unit is some rank's, and no unit two ranks'."""
        if pieces.statistic is None:
            return torch.empty(0), 0
        first = next(iter(held.values()))
        part, per = first.parts[0], first.spec.per_unit
        begin, end = (-(-place // per) * pieces.statistic.per_unit for place in (part.start, part.stop))
        kind = pieces.statistic.dtype
        if self.splitter.device.type == "cpu":
            return zeros_in_pages(end - begin, kind), begin
        return torch.zeros(end - begin, dtype=kind, device=self.splitter.device), begin


def _write_own(own: Tensor, begin: int, values: Tensor, first: int) -> None:
    low, high = max(begin, first), min(begin + own.numel(), first + values.numel())
    if low < high:
        own[low - begin : high - begin] = values[low - first : high - first]


def _cut(values: Tensor, unit: int) -> Iterator[tuple[int, Tensor]]:
    step = values.numel() if values.device.type != "cpu" else max(1, PIECE // unit) * unit
    return ((start, values[start : start + step]) for start in range(0, values.numel(), max(1, step)))


def _joined(intervals: Sequence[Interval]) -> list[Interval]:
    """The same entries in intervals that do not touch."""
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
