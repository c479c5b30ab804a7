"""Token ids against the rows of the model's embedding: what counts is which ids a run uses, not how many the tokenizer has.

Tokenizers with more entries than the model has rows are common (a token for images beside a text model, marks of an infilling
variant), and their text trains well as long as none of these comes in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import text_config
from dist_subspace.loading.load import model_config
from dist_subspace.training.data import Prepared, TokenTable

MOST_FILLED = 1024  # rows that are made for tokens which nobody asked for; more is another model's tokenizer


def embedding_rows(folder: Path, trust_remote_code: bool = False) -> int | None:
    """How many token ids the model has a row for; None where its configuration does not say."""
    return getattr(text_config(model_config(folder, trust_remote_code)), "vocab_size", None)


def without_gap(ids: Sequence[int], rows: int | None, tokenizer: Any, notice: Callable[[str], None]) -> tuple[int, ...]:
    """Ids of new tokens, and behind them those between the model's rows and the last of them: a table grows without gaps.

    Raises:
        UsageError: for a tokenizer that is larger than the model by more than a few tokens.
    """
    above = [i for i in ids if rows is not None and i >= rows]
    if rows is None or not above:
        return tuple(ids)
    missing = sorted(set(range(rows, max(above))) - set(ids))
    if len(missing) > MOST_FILLED:
        raise UsageError(
            f"model.new_tokens gives {tokenizer.convert_ids_to_tokens(above[0])!r} the id {above[0]:,}, and the model has "
            f"{rows:,} rows; accepted: new tokens with the model's own tokenizer"
        )
    if missing:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in missing[:4])
        notice(
            f"the tokenizer has {names}{', ...' if len(missing) > 4 else ''} between the model's {rows:,} rows and "
            "model.new_tokens: new rows too"
        )
    return (*ids, *missing)


def usable_pad_id(tokenizer: Any, rows: int | None, new_ids: Sequence[int], notice: Callable[[str], None]) -> int:
    """The id that pads: the tokenizer's where the model has a row for it, else another special one (what is padded is masked)."""
    pad: int = tokenizer.pad_token_id
    if rows is None or pad < rows or pad in new_ids:
        return pad
    others = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    chosen = next(i for i in others if i is not None and i < rows)
    notice(
        f"the model has {rows:,} rows and none for the padding token {tokenizer.pad_token!r} (id {pad:,}): "
        f"{tokenizer.convert_ids_to_tokens(chosen)!r} pads, which changes no result"
    )
    return chosen


def check_ids_used(
    data: Prepared, tokenizer: Any, rows: int | None, new_ids: Sequence[int], names: Sequence[str]
) -> None:
    """Every id of the data must have a row. Reads the tokens only where the tokenizer has an id without one.

    Arguments:
        names: of the training files, in the order of the data's parts.

    Raises:
        UsageError: naming the token, its id and the record that it comes from.
    """
    for table, where in ((data.train, list(names)), (data.eval, ["data.eval"])):
        if table is not None:
            check_ids_of(table, where if len(where) == len(table.parts) else [], tokenizer, rows, new_ids)


def check_ids_of(
    table: TokenTable, names: Sequence[str], tokenizer: Any, rows: int | None, new_ids: Sequence[int]
) -> None:
    """`check_ids_used` of one table, whose parts have these names."""
    if rows is not None and largest_id(tokenizer) >= max([rows - 1, *new_ids]) + 1:
        _check_table(table, names, tokenizer, rows, new_ids)


def largest_id(tokenizer: Any) -> int:
    """The largest id that the tokenizer gives: a vocabulary with gaps has fewer tokens than ids."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _check_table(table: TokenTable, names: Sequence[str], tokenizer: Any, rows: int, new_ids: Sequence[int]) -> None:
    for number, part in enumerate(table.parts):
        columns = part.columns
        if not len(columns.ids) or int(columns.ids.max()) < rows:
            continue
        without = (columns.ids >= rows) & ~np.isin(columns.ids, np.asarray(new_ids, np.int64))
        place = int(np.argmax(without))
        if not without[place]:
            continue
        unknown = int(columns.ids[place])
        record = int(columns.records[np.searchsorted(columns.offsets, place, side="right") - 1])
        token = tokenizer.convert_ids_to_tokens(unknown)
        raise UsageError(
            f"{names[number] if names else 'data.train'}: record {record} has the token {token!r} (id {unknown:,}), and the "
            f"model has {rows:,} rows; accepted: the model's own tokenizer, text without that token, or "
            f"model.new_tokens: [{token!r}]"
        )
