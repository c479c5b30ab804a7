"""How many tokens a row of a model may have, and the position of the first one: asked of the model, not of its configuration.

`max_position_embeddings` is what it says in some families only. RoBERTa's descendants count from the padding id on, so that
514 positions hold 512 tokens; OPT's table is two rows longer than it says; DeBERTa has the number and no limit. So an empty
model is called with rows of the length in question, and its table lookups are watched; no weight is read or made.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from dist_subspace.families.buffers import has_rotary_table
from dist_subspace.families.configuration import config_of, is_encoder_decoder, stated_positions, text_config

SHORT = 8  # tokens that any model takes: where these fail, nothing can be learned from a call
MOST_TRIED = 2049  # tokens of a row that is run through a whole layer of attention
PRODUCTS = (functional.linear, torch.addmm)


@dataclass(frozen=True)
class Positions:
    """What a model can do with the places of tokens in a row."""

    longest: int | None
    """Most tokens of a row; None where nothing limits it."""
    first: int
    """The position id of a sample's first token, as the model itself numbers them where it is not told."""


def positions_of(make: Callable[[PretrainedConfig], nn.Module], config: PretrainedConfig, wanted: int) -> Positions:
    """The positions of a model, found by calling an empty one with rows of up to `wanted` tokens.

    Arguments:
        make: gives the empty model of a configuration, on the meta device.
        wanted: tokens of the longest row that is needed. It fits where `longest` is None or not below it; only where it does
            not fit is `longest` the exact limit.
    """
    stated = stated_positions(config)
    try:
        model = _with_free_weights(short_model(make, config))
    except Exception:  # an odd family: what its configuration states is all that is known
        return Positions(stated, 0)
    parts = [model, *_decoder_of(model)]
    if not all(_table_lookups(part, SHORT) is not None for part in parts):
        return Positions(stated, 0)
    first = _first_position(model)
    if any(_has_table(part) for part in parts):

        def fits(length: int) -> bool:
            return all(_table_lookups(part, length) is not None for part in parts)

        return Positions(max(wanted, stated or 0) if fits(wanted) else _largest_below(fits, wanted), first)
    if stated is None or wanted <= stated:
        return Positions(stated, first)
    # Rotary positions beyond those of pretraining raise no error and are worth little; Falcon makes the table also without use.
    rotary = has_rotary_table(model) and not getattr(text_config(config), "alibi", False)
    if rotary or stated >= MOST_TRIED or _table_lookups(model, stated + 1, through=True) is None:
        return Positions(stated, first)
    return Positions(None, first)


def count_from(model: nn.Module, first: int) -> None:
    """Position ids that the model is given from now on count from 0, and reach its table as it counts itself."""

    def shifted(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get("position_ids")
        return args, kwargs if given is None else kwargs | {"position_ids": given + first}

    if first:
        model.register_forward_pre_hook(shifted, with_kwargs=True)


class _LookupsDone(Exception):
    """The lookups of a call are behind it: a product comes."""


class _LookupWatch(TorchFunctionMode):
    """Table lookups are checked and noted, and give zeros; the first product ends the call, or gives zeros too."""

    def __init__(self, through: bool) -> None:
        super().__init__()
        self.through = through
        self.lookups: list[tuple[int, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.embedding:
            ids, table = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
                raise IndexError(f"row {int(ids.max())} of {table.shape[0]}")
            self.lookups.append((table.shape[0], ids))
            return torch.zeros(*ids.shape, table.shape[1])
        if function in PRODUCTS:
            if not self.through:
                raise _LookupsDone
            x, weight = (args[0], args[1].mT) if function is functional.linear else (args[1], args[2])
            return torch.zeros(*x.shape[:-1], weight.shape[-1])
        return function(*args, **kwargs)


def _table_lookups(
    model: nn.Module, length: int, through: bool = False, **inputs: Any
) -> list[tuple[int, Tensor]] | None:
    """(rows of the table, ids) of each lookup for one row of so many tokens; None where the model cannot take it."""
    config = config_of(model)
    ids = torch.full((1, length), next(i for i in (5, 6, 7) if i != getattr(text_config(config), "pad_token_id", None)))
    watch = _LookupWatch(through)
    try:
        with torch.no_grad(), watch:
            model(input_ids=ids, **inputs)
    except _LookupsDone:
        pass
    except Exception:  # an index beyond a table, or a slice of a buffer that is too short for the row
        return None
    return watch.lookups


def _first_position(model: nn.Module) -> int:
    """By how much the rows of a table differ between ids that count from 0 and the model's own: 0 where it takes none."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return 0
    by_itself = _table_lookups(model, SHORT)
    counted = _table_lookups(model, SHORT, position_ids=torch.arange(SHORT)[None])
    if by_itself is None or counted is None or len(by_itself) != len(counted):
        return 0
    for (_, ids), (_, from_zero) in zip(by_itself, counted):
        if ids.shape == from_zero.shape and not torch.equal(ids, from_zero):
            steps = (ids - from_zero).unique()
            return int(steps) if len(steps) == 1 else 0
    return 0


def _has_table(model: nn.Module) -> bool:
    """Whether a table is asked for another row at each place."""
    lookups = _table_lookups(model, SHORT) or []
    return any(len(ids.unique()) >= SHORT for _, ids in lookups)


def _largest_below(fits: Callable[[int], bool], above: int) -> int:
    """The largest number below `above` that fits."""
    low = SHORT
    while above - low > 1:
        middle = (low + above) // 2
        low, above = (middle, above) if fits(middle) else (low, middle)
    return low


def short_model(make: Callable[[PretrainedConfig], nn.Module], config: PretrainedConfig) -> nn.Module:
    """A model of one layer, which is enough and quicker made, or of all where the configuration cannot be shortened."""
    short = copy.deepcopy(config)
    try:
        text_config(short).num_hidden_layers = 1
        return make(short)
    except Exception:
        return make(copy.deepcopy(config))


def _with_free_weights(model: nn.Module) -> nn.Module:
    """The empty model with weights of zeros that take no memory: one number each, seen at the weight's size."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model.eval()


def _decoder_of(model: Any) -> list[nn.Module]:
    """The decoder of an encoder-decoder, whose rows are as long as the encoder's here; nothing for other models."""
    if not is_encoder_decoder(model) or not hasattr(model, "get_decoder"):
        return []
    return [model.get_decoder()]
