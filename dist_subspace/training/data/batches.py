"""Global batches as a function of the step: the same samples at any world size, divided into micro-batches by rank.

Rows (samples, or packed rows) of epoch 0, 1, 2, ... stand in one endless line, and global batch s is the rows from
s * global_batch_size on. So every global batch is full, no sample is dropped at the end of an epoch, and nothing
needs to be remembered to go on from any step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dist_subspace.errors import UsageError
from dist_subspace.training.data.collate import Collator, MicroBatch, Row
from dist_subspace.training.data.order import epoch_size, sample_order
from dist_subspace.training.data.packing import pack
from dist_subspace.training.data.preference_batch import chosen_tokens
from dist_subspace.training.data.table import TokenTable

EPOCHS_KEPT = 2  # a global batch may reach from one epoch into the next


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's data, as one rank sees it. Counts are those of all ranks together."""

    step: int
    rounds: list[MicroBatch | None]
    """This rank's micro-batches, equally many on every rank; None where this rank idles in that round."""
    filler: MicroBatch
    """A real micro-batch, as small as there is, that an idle rank runs with weight zero (its module calls must match)."""
    targets: int
    samples: int
    tokens: int
    epoch: float
    """How many epochs are behind once this batch is done."""
    chosen_tokens: int = 0
    """Predicted tokens of the chosen texts, prompts among them (orpo)."""

    @property
    def terms(self) -> int:
        """What its loss is a mean over: targets, or pairs and answers that are preferred."""
        return self.targets if self.filler.preferences is None else self.samples


@dataclass(frozen=True)
class BatchSettings:
    """How rows, which are samples or with `packing` several samples each, are divided into batches."""

    global_batch_size: int | None
    """Rows of an optimizer step, a multiple of `micro_batch_size`; None: all rows of the first epoch, less those that no whole
    micro-batch is left for (they come in the next step, as at every size)."""
    micro_batch_size: int
    """Rows of a forward call."""
    seed: int
    packing: bool
    max_length: int
    """Tokens of a packed row."""
    padding_side: str = "right"
    pad_to_multiple: int = 1
    segment_lengths: bool = False
    """Whether attention is told where samples begin (`cu_seq_lens`), instead of by positions alone."""
    objective: str = "sft"
    """Of the training: other ones than sft take preferences."""


class Batches:
    """The global batches of a training run. `batch(step)` is a pure function; ranks agree without talking."""

    def __init__(self, table: TokenTable, settings: BatchSettings, pad_id: int, rank: int, world_size: int) -> None:
        """Raises UsageError where an epoch has fewer rows than a global batch."""
        self.table, self.seed, self.rank, self.world_size = table, settings.seed, rank, world_size
        self.micro_batch_size, self.max_length = settings.micro_batch_size, settings.max_length
        self.packing = settings.packing
        self.collate = Collator(
            table,
            pad_id,
            settings.packing,
            settings.padding_side,
            settings.pad_to_multiple,
            settings.segment_lengths,
            settings.objective,
            settings.max_length,
        )
        self._counts: list[int] = []
        self._epochs: OrderedDict[int, list[Row]] = OrderedDict()
        self.global_batch_size = self._whole_batch(settings.global_batch_size)
        self.micro_per_step = self.global_batch_size // self.micro_batch_size

    def _whole_batch(self, requested: int | None) -> int:
        """The global batch size as requested, or the largest that an epoch fills."""
        rows = self.rows_per_epoch(0)
        largest = rows // self.micro_batch_size * self.micro_batch_size
        if largest >= (requested or 1):
            return requested or largest
        row_name = "packed rows" if self.packing else "samples"
        if largest == 0:
            raise UsageError(
                f"training.per_device_train_batch_size is {self.micro_batch_size}, but the data has {rows} {row_name}; "
                "accepted: at most that many"
            )
        raise UsageError(
            f"training.global_batch_size is {requested}, but the data has {rows} {row_name}; "
            f"accepted: at most {largest}, or null for all of them"
        )

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows of an epoch: samples, or packed rows (whose number differs a little between epochs)."""
        if not self.packing:
            return epoch_size(self.table.shares)
        while len(self._counts) <= epoch:
            self._counts.append(len(self._rows(len(self._counts))))
        return self._counts[epoch]

    def first_samples(self, count: int) -> list[int]:
        """The numbers of the samples that a run begins with, in its order; fewer where there are fewer."""
        samples = (number for row in self._rows(0) for number in row)
        return list(islice(samples, count))

    @property
    def steps_per_epoch(self) -> float:
        """Steps of the first epoch; no whole number where the rows do not divide."""
        return self.rows_per_epoch(0) / self.global_batch_size

    def total_steps(self, num_train_epochs: float) -> int:
        """Steps of so many epochs, rounded up, at least 1."""
        whole_epochs = int(num_train_epochs)
        rows: float = sum(self.rows_per_epoch(epoch) for epoch in range(whole_epochs))
        if num_train_epochs > whole_epochs:
            rows += (num_train_epochs - whole_epochs) * self.rows_per_epoch(whole_epochs)
        return max(1, math.ceil(rows / self.global_batch_size - 1e-9))

    def batch(self, step: int) -> GlobalBatch:
        """Global batch number `step` (from 0), with the part of it that this rank runs."""
        rows, epoch = self._rows_of(step)
        samples = [i for row in rows for i in row]
        first = step * self.micro_per_step
        rounds: list[MicroBatch | None] = []
        for start in range(0, self.micro_per_step, self.world_size):
            index = start + self.rank
            rounds.append(self._micro_batch(rows, index, first + index) if index < self.micro_per_step else None)
        return GlobalBatch(
            step=step,
            rounds=rounds,
            filler=filler_batch(self.collate, first),
            targets=int(self.table.target_counts[samples].sum()),
            samples=len(samples),
            tokens=int(self.table.lengths[samples].sum()),
            epoch=epoch,
            chosen_tokens=chosen_tokens(self.table, samples) if self.collate.objective == "orpo" else 0,
        )

    def _micro_batch(self, rows: list[Row], index: int, number: int) -> MicroBatch:
        own = slice(index * self.micro_batch_size, (index + 1) * self.micro_batch_size)
        return self.collate(rows[own], number, _rotated(rows)[own] if self.collate.objective == "kto" else None)

    def _rows_of(self, step: int) -> tuple[list[Row], float]:
        """The rows of a global batch, and how many epochs are behind after it."""
        epoch, place = self._epoch_and_place(step * self.global_batch_size)
        rows: list[Row] = []
        while True:
            missing = self.global_batch_size - len(rows)
            rows += self._rows(epoch)[place : place + missing]
            place += missing
            if place <= self.rows_per_epoch(epoch):
                return rows, epoch + place / self.rows_per_epoch(epoch)
            epoch, place = epoch + 1, 0

    def _epoch_and_place(self, row: int) -> tuple[int, int]:
        """(epoch, place in it) of a row in the endless line of epochs."""
        if not self.packing:
            return divmod(row, self.rows_per_epoch(0))
        epoch = 0
        while row >= self.rows_per_epoch(epoch):
            row -= self.rows_per_epoch(epoch)
            epoch += 1
        return epoch, row

    def _rows(self, epoch: int) -> list[Row]:
        if epoch not in self._epochs:
            order = sample_order(self.table.shares, self.seed, epoch)
            if self.packing:
                places = pack(self.table.lengths[order].tolist(), self.max_length)
                rows: list[Row] = [[int(order[place]) for place in row] for row in places]
            else:
                rows = [(int(i),) for i in order]
            self._epochs[epoch] = rows
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


def _rotated(rows: list[Row]) -> list[int]:
    """For each sample the one before it, for the first the last: every answer stands behind another prompt, once."""
    samples = [i for row in rows for i in row]
    return samples[-1:] + samples[:-1]


def filler_batch(collate: Collator, number: int) -> MicroBatch:
    """The shortest sample alone."""
    return collate([(int(np.argmin(collate.table.lengths)),)], number)


def eval_batches(
    table: TokenTable,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    pad_id: int,
    padding_side: str = "right",
    pad_to_multiple: int = 1,
    objective: str = "sft",
    max_length: int | None = None,
) -> Iterator[MicroBatch | None]:
    """This rank's micro-batches of one pass over the table, never packed; equally many on every rank, None where idle.

    An idle rank runs `eval_filler` and counts nothing of it.
    """
    collate = Collator(
        table,
        pad_id,
        padding_side=padding_side,
        pad_to_multiple=pad_to_multiple,
        objective=objective,
        max_length=max_length,
    )
    # Longest first: rows of like length share a micro-batch, and a run that is short of memory fails at once.
    order = np.argsort(-table.lengths, kind="stable")
    count = -(-len(table) // micro_batch_size)
    for start in range(0, count, world_size):
        index = start + rank
        own = slice(index * micro_batch_size, (index + 1) * micro_batch_size)
        rows: list[Row] = [(int(i),) for i in order[own]]
        partners = [int(i) for i in np.roll(order, 1)[own]]
        yield collate(rows, index, partners) if index < count else None


def eval_filler(table: TokenTable, pad_id: int, objective: str = "sft") -> MicroBatch:
    """What a rank runs in a round of evaluation that has nothing for it."""
    return filler_batch(Collator(table, pad_id, objective=objective), 0)
