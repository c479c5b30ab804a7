"""What a data set comes to, in words: counts, lengths as bars, what is cut, what packing gains. Local."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_subspace.training.data import Prepared, TokenTable
from dist_subspace.training.data.cutting_text import cutting_text
from dist_subspace.training.data.order import sample_order
from dist_subspace.training.data.packing import pack
from dist_subspace.training.data.settings import PAIRED, is_packable

BARS, WIDE = 10, 40  # bars of the histogram, and characters of the longest
Rows = Iterator[tuple[str, str]]


def data_rows(
    data: Prepared, max_length: int, packing: bool, micro_batch: int, seed: int, form: str = "alpaca"
) -> Rows:
    """(name, text) of each line.

    Arguments:
        packing: whether the run packs; what it gains is said in any case.
        micro_batch: rows of a forward call, which are padded to the longest of them where nothing is packed.
        form: as `data.format`.
    """
    table, held_out = data.train, data.eval
    yield "samples", _counts(table) + ("" if held_out is None else f"; held out: {_counts(held_out)}")
    lengths = table.lengths
    middle, most = np.percentile(lengths, [50, 95]).astype(int)
    both = "both texts of a pair: " if form in PAIRED else ""
    yield (
        "lengths",
        f"{both}shortest {lengths.min():,}, median {middle:,}, 95% at most {most:,}, longest {lengths.max():,} tokens "
        f"(data.max_length {max_length:,})",
    )
    sentences, _ = cutting_text(data.cutting, max_length)
    yield "cut", "; ".join(sentences) or "nothing: every sample is whole"
    if data.labels is not None:
        yield "classes", f"{len(data.labels):,}: {', '.join(data.labels[:8])}{', ...' if len(data.labels) > 8 else ''}"
    elif is_packable(form):
        yield "packing", packing_text(table, max_length, packing, micro_batch, seed)
    for sentence in data.notices:
        yield "", sentence


def packing_text(table: TokenTable, max_length: int, packing: bool, micro_batch: int, seed: int) -> str:
    """How full rows are with packing and without, in the first epoch."""
    lengths = table.lengths[sample_order(table.shares, seed, 0)]
    tokens = int(lengths.sum())
    rows = len(pack(lengths.tolist(), max_length))
    batches = [lengths[start : start + micro_batch] for start in range(0, len(lengths), micro_batch)]
    padded = sum(int(batch.max()) * len(batch) for batch in batches)
    packed = f"{rows:,} rows of {max_length:,}, {_share(tokens, rows * max_length)} of them tokens"
    plain = f"{len(lengths):,} rows, {_share(tokens, padded)} of them tokens"
    calls, plain_calls = -(-rows // micro_batch), len(batches)
    gain = f"{plain_calls / calls:.1f} times fewer forward calls in an epoch"
    return f"on: {packed}; off: {plain}: {gain}" if packing else f"off: {plain}; on: {packed}: {gain}"


def histogram(data: Prepared, max_length: int) -> list[str]:
    """A bar for each range of lengths, before anything is cut or left out."""
    parts = [part.columns.seen for part in data.train.parts]
    seen = np.concatenate(parts)
    seen = seen[seen > 0]
    if not len(seen):
        return []
    low, high = int(seen.min()) - 1, int(seen.max())
    border = [max_length] if low < max_length < high else []  # no bar stands on both sides of it
    edges = np.unique(
        np.concatenate([np.linspace(low, high, BARS + 1).round().astype(np.int64), np.array(border, np.int64)])
    )
    counts, _ = np.histogram(seen, bins=edges + 0.5 if len(edges) > 1 else 1)
    lines = []
    for low, high, count in zip(edges, edges[1:], counts):
        bar = "#" * (-(-int(count) * WIDE // int(counts.max())) if count else 0)
        beyond = " longer than data.max_length" if low >= max_length else ""
        lines.append(f"{low + 1:>7,} -{high:>7,} {bar:<{WIDE}} {count:,}{beyond}")
    return lines


def _counts(table: TokenTable) -> str:
    tokens, trained = int(table.lengths.sum()), int(table.target_counts.sum())
    text = f"{len(table):,} with {tokens:,} tokens"
    return text if table.classification else f"{text}, {trained:,} of them trained ({_share(trained, tokens)})"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f}%"
