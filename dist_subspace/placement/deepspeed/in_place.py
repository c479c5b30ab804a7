"""Large embeddings and heads of a model that ZeRO-3 splits: used where their rows lie, and whole on no rank.

At 70 billion parameters either is 2 GiB when it is gathered, more than any block. A frozen embedding's rows are looked up on the
ranks that hold them. A frozen head is handed a few rows at a time (`row_source`), and multiplies with those.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.linear_map import RowPiece
from dist_subspace.placement.deepspeed.apart import is_gathered_when_called, marked_whole, set_apart, show_shards
from dist_subspace.placement.deepspeed.shards import full_shape, gathered, is_partitioned
from dist_subspace.placement.deepspeed.split_rows import SplitRows, in_pieces, look_up, row_pieces, split_rows

# Bytes of a table below which one message that gathers it is quicker than three that look rows up.
LOOKED_UP_FROM = 1 << 24
# Bytes of a head below which it is gathered whole, and of its pieces, of which there are two at a time.
IN_PIECES_FROM = 1 << 28
PIECE = 1 << 26

# How a split weight is used: whole, by a rank's own tokens, or a piece at a time.
GATHERED, LOOKED_UP, IN_PIECES = "gathered", "looked up", "in pieces"


def use_in_place(model: nn.Module) -> None:
    """Local, alike on every rank: from the next forward on that an engine gathers weights for, large frozen tables and the head
    stay where they are."""
    if model not in _PREPARED:
        _PREPARED[model] = model.register_forward_pre_hook(_before, prepend=True)


_PREPARED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _before(model: nn.Module, args: tuple[Any, ...]) -> None:
    take_apart(model)


def take_apart(model: nn.Module) -> None:
    """Local, alike on every rank: what `use_in_place` promises, now. An engine that comes later hangs its hooks anew."""
    head = output_embeddings(model)
    for module in model.modules():
        if not (isinstance(module, nn.Embedding) or module is head) or not is_gathered_when_called(module):
            continue
        if not _can_be_split_rows(module):
            continue
        use = use_of(module, module is head)
        if use == IN_PIECES:
            _head_in_pieces(module)
        elif use == LOOKED_UP and isinstance(module, nn.Embedding):
            set_apart(module)
            # A partial and no closure: a deep copy of the model gets one of its own.
            table: Any = module
            table.forward = functools.partial(_embedded, table)


def use_of(module: nn.Module, is_head: bool) -> str:
    """Local: how the module's weight is used where ZeRO-3 splits it, by its kind and size alone, on the device meta too."""
    own = list(module.parameters())
    if not own or any(p.requires_grad for p in own):
        return GATHERED
    size = math.prod(whole_shape(own[0])) * own[0].element_size()
    if is_head and getattr(module, "takes_row_pieces", False):
        return IN_PIECES if size >= IN_PIECES_FROM else GATHERED
    looks_up = isinstance(module, nn.Embedding) and len(own) == 1 and module.max_norm is None
    return LOOKED_UP if looks_up and size >= LOOKED_UP_FROM else GATHERED


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    return full_shape(parameter) if is_partitioned(parameter) else tuple(parameter.shape)


def _can_be_split_rows(module: nn.Module) -> bool:
    own = list(module.parameters())
    if not own or not all(map(is_partitioned, own)) or split_rows(own[0]) is None:
        return False
    return "forward" not in module.__dict__ or getattr(module.forward, "func", None) is _embedded


def _embedded(table: nn.Embedding, *args: Any, **kwargs: Any) -> Any:
    """Collective: the table's own forward, whose rows come from where they are."""
    forward, (weight,) = functools.partial(type(table).forward, table), table.parameters()
    split = None if weight.requires_grad or weight.numel() else split_rows(weight)
    if split is None:
        return forward(*args, **kwargs)
    with marked_whole(weight, True), _LookedUp(weight, split):
        return forward(*args, **kwargs)


class _LookedUp(TorchFunctionMode):
    """Within it `functional.embedding` of the weight looks its rows up."""

    def __init__(self, weight: Tensor, split: SplitRows) -> None:
        super().__init__()
        self.weight, self.split = weight, split

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.embedding:
            given = _ARGUMENTS.bind(*args, **(kwargs or {})).arguments
            if given["weight"] is self.weight:
                return self._rows(given["input"], func, args, kwargs)
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def _rows(self, ids: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
        rows = look_up(self.split, ids)
        if rows is None:
            with marked_whole(self.weight, False), gathered([self.weight]):
                whole: Tensor = func(*args, **(kwargs or {}))
                return whole
        return rows


_ARGUMENTS = inspect.signature(functional.embedding)


def _head_in_pieces(head: Any) -> None:
    set_apart(head)
    show_shards(head)
    head.row_source = functools.partial(_pieces, head)
    head.bias_source = functools.partial(_bias, head)


def _pieces(head: nn.Module) -> Iterator[RowPiece]:
    """Collective."""
    weight = next(head.parameters())
    split = split_rows(weight)
    assert split is not None  # as when it was taken apart
    return row_pieces(split, weight.device, PIECE)


def _bias(head: Any) -> Tensor | None:
    """Collective: the whole bias."""
    if head.bias is None:
        return None
    with gathered([head.bias]) if is_partitioned(head.bias) else nullcontext():
        return head.bias.detach().clone()  # type: ignore[no-any-return]


def pieces_of(rows: int, width: int, itemsize: int, ranks: int, shard: int) -> tuple[int, int]:
    """How many pieces a head `(rows, width)` comes in, and rows of each rank in one; shard: entries that a rank holds."""
    return in_pieces(math.ceil(min(shard, rows * width) / width), ranks, width * itemsize, PIECE)
