"""The five formats: from records to tokenised samples (design.md 5).

Each format is one function `(rows, encoder) -> for each row its samples`; None in a row's list is a sample left out
because its answer does not fit into `max_length` (or because nothing in it is trained).
"""

from __future__ import annotations

import string
from collections.abc import Callable

from dist_subspace.errors import UsageError
from dist_subspace.training.data.chat import chat
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.labels import label_of
from dist_subspace.training.data.samples import Sample, fit

Samples = list[Sample | None]
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
        kept = encoder.opening + ids[-room:] + encoder.closing
        samples.append([Sample(kept, [False] * len(kept), label) if kept else None])
    return samples


FORMATS: dict[str, Callable[[list[Row], Encoder], list[Samples]]] = {
    "alpaca": alpaca,
    "chat": chat,
    "completion": completion,
    "text": text,
    "classification": classification,
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


def _answered(rows: list[Row], prompts: list[str], answer: str, encoder: Encoder) -> list[Samples]:
    pairs = encoder.pairs(prompts, [row.text(answer) for row in rows])
    return [
        [fit(head + tail, [False] * len(head) + [True] * len(tail), row.settings.max_length)]
        for row, (head, tail) in zip(rows, pairs)
    ]


def _pieces(row: Row, encoder: Encoder) -> Samples:
    ids = list(encoder.opening)
    for block in encoder.ids(_blocks(row.text("text"))):
        ids += block
    ids += encoder.end
    size = row.settings.max_length
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    # A last piece of one token has nothing to predict; it is no loss, so it is not counted as left out.
    return [Sample(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1]


def _blocks(document: str) -> list[str]:
    blocks = []
    start = 0
    while len(document) - start > BLOCK:
        end = document.rfind("\n", start, start + BLOCK) + 1 or start + BLOCK
        blocks.append(document[start:end])
        start = end
    return [*blocks, document[start:]]
