"""A rank's own parts of a model: read from the file, packed and kept, without the rest of any tensor.

Which entries of a part come from which entries of the file is known before anything is read: a storage says how it packs by
pieces (`storage/pieces.py`), the placement which part a rank reads, the layout where the values lie. So the model is put together
first, empty, and then filled: one thread reads the file in the order of the model, and this one packs what has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_subspace.loading.held_weight import AsHeld, HeldBytes
from dist_subspace.loading.joined_bytes import JoinedBytes
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.ranges import RangeReader, chunks
from dist_subspace.loading.read_ahead import ReadAhead, Wanted
from dist_subspace.pages import zeros_in_pages
from dist_subspace.placement.protocol import Part, Splitter
from dist_subspace.storage import FlatTensor, FrozenLinear, FrozenStack, Origin, PieceWise

# Entries that are packed at a time on a CPU: what comes and goes beside them stays in its cache.
PIECE = 1 << 18
Interval = tuple[int, int]
# Is handed each piece of a weight before it is packed; says what the storage gets.
Check = Callable[[Tensor], Tensor]
Values = Sequence[Mapping[str, float]]
Look = tuple[Layout, Check, Callable[[], None]]


@dataclass
class HeldTensor:
    """A parameter's part on this rank, to be written; the parameter is one tensor or several, one behind the other."""

    spec: FlatTensor
    parameter: nn.Parameter
    part: Part
    memory: Tensor

    def units(self, number: int = 0) -> list[Interval]:
        """The units of the matrix of that number that the part is made of."""
        per, first = self.spec.per_unit, number * self.spec.numel
        low, high = max(self.part.start - first, 0), min(self.part.stop - first, self.spec.numel)
        return [(low // per, -(-high // per))] if per and low < high else []

    def write(self, values: Tensor, first: int) -> None:
        """Flat values of the whole, from entry `first` on: what belongs to the part is kept."""
        low, high = max(self.part.start, first), min(self.part.stop, first + values.numel())
        if low < high:
            self.memory[low - self.part.start : high - self.part.start].copy_(values[low - first : high - first])


@dataclass
class _Job:
    """Entries of a tensor that are to be read, and what is done with them.

    base: the flat entry that the intervals count from. take: is given the first entry of a piece, counted from there, and the
    piece. end: is called when all has been taken. size: bytes of the checkpoint that this stands for.
    """

    layout: Layout | HeldBytes
    base: int
    intervals: list[Interval]
    unit: int
    take: Callable[[int, Tensor], None]
    end: Callable[[], None]
    size: int = 0

    def wanted(self) -> Iterator[Wanted[_Job]]:
        for start, stop in self.intervals:
            for first, end in chunks(self.layout, self.base + start, self.base + stop, self.unit):
                yield Wanted(self, self.layout, first, end)

    @property
    def numel(self) -> int:
        return sum(stop - start for start, stop in self.intervals)


@dataclass
class _Waiting:
    """Matrices whose statistics are packed once they are whole: this rank's entries of them, and where these begin."""

    pieces: PieceWise
    count: int
    late: Mapping[str, HeldTensor]
    begin: int
    own: Tensor
    set_values: Callable[[Values], None]


@dataclass
class OwnParts:
    """Plans, reads and places; local, but for `finish`."""

    reader: RangeReader
    splitter: Splitter
    jobs: list[_Job] = field(default_factory=list)
    _waiting: list[_Waiting] = field(default_factory=list)

    def parameter(
        self, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, check: Check, end: Callable[[], None]
    ) -> nn.Parameter:
        """A tensor of the file as a parameter of another type, which `run` fills."""
        held = self._hold(FlatTensor(shape, dtype, 1))

        def take(first: int, values: Tensor) -> None:
            held.write(check(values).to(dtype), first)

        self.jobs.append(_Job(layout, 0, held.units(), 1, take, end))
        return held.parameter

    def linear(
        self,
        layout: Layout,
        pieces: PieceWise,
        transposed: bool,
        check: Check,
        end: Callable[[], None],
        bias: Tensor | None,
        origin: Origin | None,
    ) -> FrozenLinear:
        """A matrix of the file, which holds `(d_in, d_out)` where `transposed`, in a storage; `run` fills it."""
        parameters, waiting = self._matrices(layout, pieces, None, transposed, check, end)
        operator = pieces.operator(parameters, bias=bias, origin=origin)
        if waiting is not None:
            waiting.set_values = lambda values: operator.set_plain_values(values[0])
        return operator

    def stack(
        self,
        layout: Layout,
        pieces: PieceWise,
        transposed: bool,
        check: Check,
        end: Callable[[], None],
        origin: Origin | None,
        held: JoinedBytes | None = None,
    ) -> FrozenStack:
        """The same of matrices `(experts, d_out, d_in)`, each of which is packed by itself, or (held) is so in the file."""
        experts = layout.shape[0]
        waiting = None
        if held is not None:
            pieces, parameters = held.pieces, self.copied(held.as_held, held.pieces, count=experts)
        else:
            parameters, waiting = self._matrices(layout, pieces, experts, transposed, check, end)
        empty = {name: nn.Parameter(p.new_empty(0), requires_grad=False) for name, p in parameters.items()}
        one = pieces.operator(empty, bias=None, origin=None)
        own = one.plain_values()
        plain = [own] * experts if held is None else [own | dict(values) for values in held.plain]
        stack = FrozenStack(one, parameters, plain, transposed=transposed, origin=origin)
        if waiting is not None:
            waiting.set_values = lambda values: setattr(stack, "plain", tuple(values))
        return stack

    def copied(
        self, as_held: AsHeld, pieces: PieceWise, look: Look | None = None, count: int | None = None
    ) -> dict[str, nn.Parameter]:
        """The tensors of an operator, or of a stack of `count`, that are bytes of the file as they are, which `run` fills.

        Arguments:
            look: where the numbers lie that the bytes stand for, what is shown those of this rank, and what is called then.
        """
        parameters: dict[str, nn.Parameter] = {}
        for name, spec in {**pieces.tensors, **pieces.late}.items():
            held = self._hold(spec, count)
            if look is not None and not parameters:  # the codes come first
                layout, check, end = look
                numel = pieces.shape[0] * pieces.shape[1]
                intervals = [(low * pieces.unit, min(high * pieces.unit, numel)) for low, high in held.units()]
                self.jobs.append(_Job(layout, 0, intervals, 1, _looking(check), end))
            own = [(held.part.start, held.part.stop)] if held.part.start < held.part.stop else []
            source = HeldBytes(spec.numel * (count or 1), as_held.tensors[name])
            self.jobs.append(_Job(source, 0, own, 1, _writing(held), lambda: None))
            parameters[name] = held.parameter
        return parameters

    def run(self, progress: Callable[[int], None]) -> None:
        """Read what was planned, and fill it.

        Arguments:
            progress: is told how many bytes of the checkpoint have become the model since it was told before.
        """
        jobs, told = iter(self.jobs), 0
        current = next(jobs, None)
        done = 0

        def end() -> None:
            nonlocal current, told, done
            assert current is not None
            current.end()
            progress(current.size - told)
            current, told, done = next(jobs, None), 0, 0

        wanted = (piece for job in self.jobs for piece in job.wanted())
        with ReadAhead(self.reader, wanted, self.splitter.device) as pieces:
            for piece, values in pieces:
                while current is not piece.what_for:
                    end()
                job = piece.what_for
                job.take(piece.start - job.base, values.to(self.splitter.device, non_blocking=True))
                done += values.numel()
                now = job.size * done // job.numel
                progress(now - told)
                told = now
        while current is not None:
            end()
        self.jobs.clear()

    def finish(self) -> None:
        """Collective: pack what needs the statistics of whole matrices, and give the others what they have not read."""
        while self._waiting:
            one = self._waiting.pop(0)
            assert one.pieces.statistic is not None
            units = one.pieces.statistic.numel
            whole = torch.zeros(one.count * units, dtype=one.pieces.statistic.dtype, device=one.own.device)
            whole[one.begin : one.begin + one.own.numel()] = one.own
            whole = self.splitter.summed(whole)  # each entry is one rank's, and zero elsewhere: nothing is rounded
            # The mean of many numbers depends on the number of threads: all ranks take the first one's.
            values = self.splitter.of_first([one.pieces.plain_values(own) for own in whole.split(units)])
            for number, own in enumerate(whole.split(units)):
                for name, tensor in one.pieces.late_tensors(own, values[number]).items():
                    one.late[name].write(tensor, number * one.late[name].spec.numel)
            one.set_values(values)
        self.splitter.complete()

    def _hold(self, spec: FlatTensor, count: int | None = None) -> HeldTensor:
        shape = spec.shape if count is None else (count, *spec.shape)
        return HeldTensor(spec, *self.splitter.hold(shape, spec.dtype))

    def _matrices(
        self,
        layout: Layout,
        pieces: PieceWise,
        count: int | None,
        transposed: bool,
        check: Check,
        end: Callable[[], None],
    ) -> tuple[dict[str, nn.Parameter], _Waiting | None]:
        """One matrix, or `count` of them one behind the other: their parameters, and the jobs that fill them."""
        held = {name: self._hold(spec, count) for name, spec in pieces.tensors.items()}
        late = {name: self._hold(spec, count) for name, spec in pieces.late.items()}
        many, waiting = count or 1, None
        if pieces.statistic is not None:
            own, begin = self._own_statistic(pieces, next(iter(held.values())))
            waiting = _Waiting(pieces, many, late, begin, own, lambda _: None)
            self._waiting.append(waiting)
        if transposed and not pieces.as_given:
            layout = layout.transpose(-2, -1)
        numel = pieces.shape[0] * pieces.shape[1]
        for number in range(many):
            units = _joined([units for tensor in held.values() for units in tensor.units(number)])
            intervals = [(low * pieces.unit, min(high * pieces.unit, numel)) for low, high in units]
            take = _packing(pieces, held, waiting, number, check)
            last = end if number == many - 1 else lambda: None
            self.jobs.append(_Job(layout, number * numel, intervals, pieces.unit, take, last))
        return {name: tensor.parameter for name, tensor in {**held, **late}.items()}, waiting

    def _own_statistic(self, pieces: PieceWise, first: HeldTensor) -> tuple[Tensor, int]:
        """Memory for the statistics that this rank tells the others, and where they begin: those of the units whose first entry
        of the first tensor is in its part. Every unit is some rank's, and no unit two ranks'."""
        assert pieces.statistic is not None
        per, numel = first.spec.per_unit, first.spec.numel

        def unit_at(place: int) -> int:
            return place // numel * pieces.units + -(-(place % numel) // per)

        begin, end = (unit_at(place) * pieces.statistic.per_unit for place in (first.part.start, first.part.stop))
        kind = pieces.statistic.dtype
        if self.splitter.device.type == "cpu":
            return zeros_in_pages(end - begin, kind), begin
        return torch.zeros(end - begin, dtype=kind, device=self.splitter.device), begin


def _packing(
    pieces: PieceWise, held: Mapping[str, HeldTensor], waiting: _Waiting | None, number: int, check: Check
) -> Callable[[int, Tensor], None]:
    """What packs the pieces of the matrix of that number."""

    def take(first: int, values: Tensor) -> None:
        for offset, piece in _cut(check(values), pieces.unit):
            unit = (first + offset) // pieces.unit
            packed = pieces.pack(piece)
            for name, tensor in held.items():
                tensor.write(packed[name], number * tensor.spec.numel + unit * tensor.spec.per_unit)
            if waiting is not None and pieces.statistic is not None:
                place = number * pieces.statistic.numel + unit * pieces.statistic.per_unit
                _write_own(waiting.own, waiting.begin, packed[pieces.STATISTIC], place)

    return take


def _looking(check: Check) -> Callable[[int, Tensor], None]:
    def take(_: int, values: Tensor) -> None:
        check(values)

    return take


def _writing(held: HeldTensor) -> Callable[[int, Tensor], None]:
    def take(first: int, values: Tensor) -> None:
        held.write(values, first)

    return take


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
