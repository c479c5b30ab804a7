"""From preferences to the tensors of one micro-batch, padded and laid out by TRL's collators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dist_subspace.training.data.micro_batch import MicroBatch, Preferences
from dist_subspace.training.data.preference import DESIRABLE
from dist_subspace.training.data.samples import IGNORED, first_text
from dist_subspace.training.data.table import TokenTable

MISMATCHED = "KL_"  # what TRL's names begin with where a prompt stands before another one's answer


def split_pair(table: TokenTable, i: int) -> tuple[list[int], list[int], list[int]]:
    """(prompt, chosen, rejected) ids of sample i."""
    ids, labels = table.sample(i)
    trained = labels != IGNORED
    first, prompt = first_text(trained), int(np.argmax(trained))
    return ids[:prompt].tolist(), ids[prompt:first].tolist(), ids[first + prompt :].tolist()


def split_single(table: TokenTable, i: int) -> tuple[list[int], list[int]]:
    """(prompt, answer) ids of sample i."""
    ids, labels = table.sample(i)
    prompt = int(np.argmax(labels != IGNORED))
    return ids[:prompt].tolist(), ids[prompt:].tolist()


def chosen_tokens(table: TokenTable, samples: Sequence[int]) -> int:
    """Predicted tokens of the chosen texts of these samples, prompts among them."""
    return sum(first_text(table.sample(i)[1] != IGNORED) - 1 for i in samples)


def paired_batch(
    table: TokenTable, samples: Sequence[int], number: int, pad_id: int, multiple: int, whole_chosen: bool
) -> MicroBatch:
    """Arguments: whole_chosen: whether the chosen texts are predicted with their prompts (orpo)."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    examples = [dict(zip(names, split_pair(table, i), strict=True)) for i in samples]
    made = DataCollatorForPreference(pad_token_id=pad_id, pad_to_multiple_of=multiple)(examples)
    targets = made["completion_mask"].clone()
    if whole_chosen:
        targets[: len(samples)] = made["attention_mask"][: len(samples)]
    count = int(made["attention_mask"][: len(samples), 1:].sum())
    return _micro_batch(made, "", targets, Preferences(made["completion_mask"], count), number, len(samples))


def unpaired_batch(
    table: TokenTable,
    samples: Sequence[int],
    partners: Sequence[int],
    number: int,
    pad_id: int,
    multiple: int,
    max_length: int | None,
) -> MicroBatch:
    """Arguments: partners: for each sample the one whose answer stands behind its prompt in `mismatched`, where it is cut to
    `max_length`."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    examples = []
    for i, partner in zip(samples, partners, strict=True):
        prompt, answer = split_single(table, i)
        other = split_single(table, partner)[1]
        label = table.label(i) == DESIRABLE
        examples.append({"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": label})
    collate = DataCollatorForUnpairedPreference(pad_token_id=pad_id, max_length=max_length, pad_to_multiple_of=multiple)
    made = collate(examples)
    other_mask = made[f"{MISMATCHED}completion_mask"]
    mismatched = _micro_batch(made, MISMATCHED, other_mask, Preferences(other_mask, 0), number, len(samples))
    said = Preferences(made["completion_mask"], 0, made["label"], mismatched)
    return _micro_batch(made, "", made["completion_mask"], said, number, len(samples))


def _micro_batch(
    made: dict[str, Tensor], prefix: str, targets: Tensor, preferences: Preferences, number: int, samples: int
) -> MicroBatch:
    ids, mask = made[f"{prefix}input_ids"], made[f"{prefix}attention_mask"]
    labels = ids.masked_fill(targets == 0, IGNORED)
    labels[:, 0] = IGNORED
    positions = torch.arange(ids.shape[1]) * mask
    return MicroBatch(
        number=number,
        inputs={"input_ids": ids, "position_ids": positions, "attention_mask": mask},
        labels=labels,
        targets=int((labels != IGNORED).sum()),
        samples=samples,
        tokens=int(mask.sum()),
        preferences=preferences,
    )
