"""From samples to the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_subspace.subspace.virtual_tokens.segments import kernel_lengths
from dist_subspace.training.data.micro_batch import MicroBatch
from dist_subspace.training.data.preference_batch import paired_batch, unpaired_batch
from dist_subspace.training.data.samples import IGNORED
from dist_subspace.training.data.table import TokenTable

Row = Sequence[int]
"""The numbers of the samples that share a row (one, without packing)."""


@dataclass(frozen=True)
class Collator:
    """How rows become tensors. What a micro-batch looks like depends on its own rows only, never on ranks."""

    table: TokenTable
    pad_id: int
    packing: bool = False
    padding_side: str = "right"
    pad_to_multiple: int = 1
    segment_lengths: bool = False
    """Give the attention kernel the lengths of a packed row's segments (flash attention)."""
    objective: str = "sft"
    """Of the training: other ones than sft take preferences."""
    max_length: int | None = None
    """That a prompt with another one's answer is cut to."""

    def __call__(self, rows: Sequence[Row], number: int, partners: Sequence[int] | None = None) -> MicroBatch:
        """Arguments: partners: for each sample of single answers another one, whose answer its prompt is given too."""
        samples = [i for row in rows for i in row]
        if self.objective in ("dpo", "orpo"):
            whole_chosen = self.objective == "orpo"
            return paired_batch(self.table, samples, number, self.pad_id, self.pad_to_multiple, whole_chosen)
        if self.objective == "kto":
            others = samples if partners is None else partners
            multiple, longest = self.pad_to_multiple, self.max_length
            return unpaired_batch(self.table, samples, others, number, self.pad_id, multiple, longest)
        tokens = int(self.table.lengths[samples].sum())
        targets = int(self.table.target_counts[samples].sum())
        pieces = [[self.table.sample(i) for i in row] for row in rows]
        inputs, labels = self._classify(pieces) if self.table.classification else self._predict(pieces)
        return MicroBatch(number, inputs, labels, targets, len(samples), tokens)

    def _predict(self, rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> tuple[dict[str, Any], Tensor]:
        ids = [np.concatenate([ids for ids, _ in row]) for row in rows]
        labels = [np.concatenate([labels for _, labels in row]) for row in rows]
        positions = [np.concatenate([np.arange(len(ids)) for ids, _ in row]) for row in rows]
        inputs: dict[str, Any] = {"input_ids": self._stack(ids, self.pad_id), "position_ids": self._stack(positions, 0)}
        if not self.packing:
            inputs["attention_mask"] = self._stack([np.ones_like(row) for row in ids], 0)
        else:
            # Padding is a segment of its own: its positions begin at 0 again, and no attention mask is needed.
            for row, sample_positions in zip(inputs["position_ids"], positions):
                row[len(sample_positions) :] = torch.arange(len(row) - len(sample_positions))
            if self.segment_lengths:
                inputs |= kernel_lengths(inputs["position_ids"])
        return inputs, self._stack(labels, IGNORED)

    def _classify(self, rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> tuple[dict[str, Any], Tensor]:
        ids = [row[0][0] for row in rows]
        mask = self._stack([np.ones_like(row) for row in ids], 0)
        labels = torch.from_numpy(np.concatenate([row[0][1] for row in rows]))
        return {"input_ids": self._stack(ids, self.pad_id), "attention_mask": mask}, labels

    def _stack(self, rows: list[np.ndarray], filler: int) -> Tensor:
        width = max(len(row) for row in rows)
        width = -(-width // self.pad_to_multiple) * self.pad_to_multiple
        stacked = np.full((len(rows), width), filler, np.int64)
        left = self.padding_side == "left" and not self.packing
        for stacked_row, row in zip(stacked, rows):
            stacked_row[width - len(row) if left else 0 :][: len(row)] = row
        return torch.from_numpy(stacked)
