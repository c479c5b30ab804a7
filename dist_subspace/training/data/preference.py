"""Preferences about texts: a prompt with a better and a worse answer, or with one answer that is desirable or not.

The prompt has the ids that `generate` gives it. Both answers are cut alike: the prompt loses its left part where the longer
answer has no room, so that what differs between the two is what was answered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.cutting import leading
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.samples import NOTHING, Outcome, Sample
from dist_subspace.training.data.values import shown

SAME = "{count} records have the same answer as chosen and as rejected, which prefers nothing: they are left out"
DESIRABLE, UNDESIRABLE = "true", "false"
"""The labels of samples with one answer."""


def preference(rows: list[Row], encoder: Encoder) -> list[list[Outcome]]:
    """prompt, chosen, rejected; without a prompt it is what both answers begin with."""
    texts = [_pair(row) for row in rows]
    prompts = [prompt for prompt, _, _ in texts]
    chosen = encoder.pairs(prompts, [better for _, better, _ in texts])
    rejected = encoder.pairs(prompts, [worse for _, _, worse in texts])
    return [
        [sample_of(row, head, [better, worse], None, encoder)]
        for row, (head, better), (_, worse) in zip(rows, chosen, rejected, strict=True)
    ]


def unpaired_preference(rows: list[Row], encoder: Encoder) -> list[list[Outcome]]:
    """prompt, completion, label: whether the answer is desirable."""
    pairs = encoder.pairs([text_of(row, "prompt") for row in rows], [text_of(row, "completion") for row in rows])
    return [
        [sample_of(row, head, [answer], desirable(row), encoder)]
        for row, (head, answer) in zip(rows, pairs, strict=True)
    ]


def desirable(row: Row) -> str:
    """The record's label, as samples have it.

    Raises:
        UsageError: one that is neither true nor false.
    """
    label = row.value("label")
    if isinstance(label, str) and label.lower() in (DESIRABLE, UNDESIRABLE):  # as CSV has it
        return label.lower()
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise UsageError(f"{row} has the label {shown(label)}; accepted: true (desirable) or false")
    return DESIRABLE if label else UNDESIRABLE


def text_of(row: Row, name: str) -> str:
    """The column's text; where it holds messages, the message says which format has them."""
    if isinstance(row.record.get(row.settings.column(name)), list | dict):
        raise UsageError(
            f"{row} has messages in column {row.settings.column(name)!r}, and data.format {row.settings.format!r} has texts; "
            f"accepted with messages: chat-{row.settings.format}"
        )
    return row.text(name)


def sample_of(
    row: Row,
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    label: str | None,
    encoder: Encoder,
    remarks: tuple[str, ...] = (),
) -> Outcome:
    """The ids of a prompt with those of one answer or of two, cut to `data.max_length`; left out where an answer has no room, or
    where both answers are one.

    Raises:
        UsageError: an empty prompt, behind which a first token is predicted by nothing.
    """
    if not len(prompt):
        raise UsageError(f"{row} has an empty prompt; accepted: at least one token before the answers")
    if not all(map(len, answers)):
        return NOTHING
    if len(answers) == 2 and list(answers[0]) == list(answers[1]):
        return Outcome(None, 0, (*remarks, SAME))
    longest = max(map(len, answers))
    room, whole = row.settings.max_length - longest, len(prompt) + longest
    if room < 1:
        return Outcome(None, whole, remarks)
    kept = _cut(list(prompt), room, leading(prompt, encoder.special))
    ids = [i for answer in answers for i in (*kept, *answer)]
    trained = [flag for answer in answers for flag in (*[False] * len(kept), *[True] * len(answer))]
    return Outcome(Sample(ids, trained, label, is_pair=len(answers) == 2), whole, remarks)


def _cut(prompt: list[int], room: int, marks: int) -> list[int]:
    """The prompt without its left part; its first special tokens stay where there is room for more than these."""
    if len(prompt) <= room:
        return prompt
    head = marks if marks < room else 0
    return prompt[:head] + prompt[len(prompt) - (room - head) :]


def _pair(row: Row) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) as texts."""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if row.record.get(row.settings.column("prompt")) is not None:
        return text_of(row, "prompt"), chosen, rejected
    shared: Any = os.path.commonprefix([chosen, rejected])
    shared = shared[:-1] if shared.endswith(" ") else shared  # a blank is its word's
    if not shared:
        raise UsageError(
            f"{row} has no column {row.settings.column('prompt')!r}, and its answers do not begin alike; accepted: a prompt, or "
            "chosen and rejected that both begin with it"
        )
    return shared, chosen[len(shared) :], rejected[len(shared) :]
