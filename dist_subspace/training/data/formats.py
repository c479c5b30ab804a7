"""The formats: from records to tokenised samples (docs/usage.md, "Data").

Each format is one function `(rows, encoder) -> for each row what became of its samples`: cut to `max_length`, or left out
because an answer does not fit (or because nothing in it is trained).
"""

from __future__ import annotations

import string
from collections.abc import Callable

from dist_subspace.errors import UsageError
from dist_subspace.training.data.chat import chat
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.cutting import fit, leading
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.labels import label_of
from dist_subspace.training.data.preference import preference, unpaired_preference
from dist_subspace.training.data.preference_chat import chat_preference, chat_unpaired_preference
from dist_subspace.training.data.samples import NOTHING, Outcome, Sample

Samples = list[Outcome]
ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
ALPACA_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"
BLOCK = 1 << 20  # characters; a longer document is tokenised block by block, cut at line ends


def alpaca(rows: list[Row], encoder: Encoder) -> list[Samples]:
    """instruction, input (may be absent), output; `data.template` replaces the prompt's text."""
    return _answered(rows, [alpaca_prompt(row) for row in rows], "output", encoder)


def completion(rows: list[Row], encoder: Encoder) -> list[Samples]:
    """prompt, completion: joined as they stand."""
    return _answered(rows, [row.text("prompt") for row in rows], "completion", encoder)


def text(rows: list[Row], encoder: Encoder) -> list[Samples]:
    """Every token is a target; cut into pieces of `max_length`, the end of sequence after the last."""
    return [_pieces(row, encoder) for row in rows]


def classification(rows: list[Row], encoder: Encoder) -> list[Samples]:
    """text, label; a text that is too long loses its left part, never the marks around it."""
    samples: list[Samples] = []
    for row, ids in zip(rows, encoder.ids([row.text("text") for row in rows])):
        label = label_of(row)
        room = row.settings.max_length - len(encoder.opening) - len(encoder.closing)
        if room < 1:
            raise UsageError(
                f"data.max_length is {row.settings.max_length}; accepted: room for more than special tokens"
            )
        kept_ids = encoder.opening + ids[-room:] + encoder.closing
        whole_length = len(encoder.opening) + len(ids) + len(encoder.closing)
        samples.append(
            [Outcome(Sample(kept_ids, [False] * len(kept_ids), label), whole_length) if kept_ids else NOTHING]
        )
    return samples


FORMATS: dict[str, Callable[[list[Row], Encoder], list[Samples]]] = {
    "alpaca": alpaca,
    "chat": chat,
    "completion": completion,
    "text": text,
    "classification": classification,
    "preference": preference,
    "chat-preference": chat_preference,
    "unpaired-preference": unpaired_preference,
    "chat-unpaired-preference": chat_unpaired_preference,
}


def alpaca_prompt(row: Row) -> str:
    """The prompt of an alpaca record, as it is trained and as `generate` must be given it."""
    fields = {"instruction": row.text("instruction"), "input": row.text("input", optional=True)}
    if row.settings.template is not None:
        return _filled(row.settings.template, row.texts() | fields)
    return (ALPACA if fields["input"].strip() else ALPACA_WITHOUT_INPUT).format_map(fields)


def _filled(template: str, fields: dict[str, str]) -> str:
    """The template with plain {names} filled in: no attributes, indices or format specifications."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"data.template is {template!r}, which cannot be read: {error}") from error
    text = ""
    for literal, name, specification, conversion in parts:
        text += literal
        if name is None:
            continue
        if name not in fields or specification or conversion:
            raise UsageError(f"data.template has {{{name}}}; accepted: {', '.join('{' + f + '}' for f in fields)}")
        text += fields[name]
    return text


def _answered(rows: list[Row], prompts: list[str], answer_column: str, encoder: Encoder) -> list[Samples]:
    pairs = encoder.pairs(prompts, [row.text(answer_column) for row in rows])
    return [[_fitted(row, head, tail, encoder)] for row, (head, tail) in zip(rows, pairs)]


def _fitted(row: Row, head: list[int], tail: list[int], encoder: Encoder) -> Outcome:
    trained = [False] * len(head) + [True] * len(tail)
    return fit(head + tail, trained, row.settings.max_length, keep=[leading(head, encoder.special)])


def _pieces(row: Row, encoder: Encoder) -> Samples:
    text_ids = [i for block in encoder.ids(_blocks(row.text("text"))) for i in block]
    if not text_ids:
        return [NOTHING]
    ids = encoder.ended(encoder.begun(text_ids))
    pieces = [ids[start:end] for start, end in _parts(len(ids), row.settings.max_length)]
    return [Outcome(Sample(piece, [True] * len(piece)), len(piece)) for piece in pieces] or [NOTHING]


def _parts(length: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of pieces of `size` tokens. A first token is no target, so a last piece has two at least: the piece before
    it is one shorter, or, where that would leave one token there, gives its last token twice."""
    parts = [(start, min(start + size, length)) for start in range(0, length, size)]
    if parts and parts[-1][1] - parts[-1][0] == 1:
        if len(parts) == 1:
            return []
        if size > 2:
            parts[-2] = (parts[-2][0], parts[-2][1] - 1)
        parts[-1] = (parts[-1][0] - 1, length)
    return parts


def _blocks(document: str) -> list[str]:
    blocks = []
    start = 0
    while len(document) - start > BLOCK:
        end = document.rfind("\n", start, start + BLOCK) + 1 or start + BLOCK
        blocks.append(document[start:end])
        start = end
    return [*blocks, document[start:]]
