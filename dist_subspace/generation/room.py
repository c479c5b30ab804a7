"""How long a row of a model may be where it writes, and whether rows of different lengths may stand in one batch: asked of the
model, not of its configuration."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dist_subspace.families.configuration import is_encoder_decoder
from dist_subspace.loading.positions import Positions, positions_of
from dist_subspace.loading.transformers_internals import build_again
from dist_subspace.subspace import attachment
from dist_subspace.subspace.core.sites import AddsPositions

_REAL, _PADDED = 6, 5  # tokens of the row that is tried, and hidden ones beside it
_ROUNDINGS = 16.0  # units in the last place, of the largest logit, that padding may change it by


def positions(model: Any, wanted: int) -> Positions:
    """What the model can do with the places of tokens, found by calling an empty one of its class.

    Arguments:
        wanted: tokens of the longest row that is needed.
    """
    kind, dtype = type(model), torch.float32
    return positions_of(lambda changed: build_again(kind, changed, dtype), model.config, wanted)


def longest_row(model: nn.Module, wanted: int) -> int | None:
    """Most tokens of a row, prompt and answer, that the model takes; None where `wanted` fit and nobody says more.

    Virtual tokens of a method are not counted: they take their places first.
    """
    attached, virtual = attachment(model), 0
    if attached is not None and issubclass(attached.resolved.method, AddsPositions):
        virtual = attached.resolved.method.added_positions(attached.settings)
    found = positions(model, wanted + virtual).longest
    return None if found is None else found - virtual


def takes_padding(model: Any) -> bool:
    """Collective where the model is split: whether hidden tokens beside a row leave what the model says as it is.

    A recurrent model without a mask of its own reads them all the same: its rows are answered with rows of their length alone.
    """
    if model not in _TAKES:
        _TAKES[model] = _takes_padding(model)
    return _TAKES[model]


_TAKES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def padded(rows: list[list[int]], pad_id: int, device: torch.device, *, right: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask) `(rows, longest)`: padding stands on the left, where the answer does not follow it, or of an encoder on the
    right."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if right else slice(longest - len(row), longest)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def _takes_padding(model: Any) -> bool:
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    row = [(7 + 3 * i) % vocabulary for i in range(_REAL)]
    longer = [(5 + i) % vocabulary for i in range(_REAL + _PADDED)]
    alone, beside = _first_logits(model, [row]), _first_logits(model, [row, longer])
    largest = float(alone.abs().max())
    step = torch.finfo(model.dtype).eps if model.dtype.is_floating_point else 1e-3
    return float((alone - beside).abs().max()) <= max(1e-4, _ROUNDINGS * step) * max(largest, 1e-6)


def _first_logits(model: Any, rows: list[list[int]]) -> Tensor:
    """What the model says of the first new token of the first row."""
    ids, mask = padded(rows, 0, model.device, right=is_encoder_decoder(model))
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits: Tensor = made.logits[0][0].float()
    return logits
