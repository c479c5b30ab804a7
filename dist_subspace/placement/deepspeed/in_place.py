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
from dist_subspace.placement.deepspeed.split_rows import SplitRows, look_up, row_pieces, split_rows

# Bytes of a table below which one message that gathers it is quicker than three that look rows up.
LOOKED_UP_FROM = 1 << 24
# Bytes of a head below which it is gathered whole, and of its pieces, of which there are two at a time.
IN_PIECES_FROM = 1 << 28
PIECE = 1 << 26


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
        if module is head and head_bytes(module) >= IN_PIECES_FROM:
            _head_in_pieces(module)
        elif isinstance(module, nn.Embedding) and _is_looked_up(module):
            set_apart(module)
            # A partial and no closure: a deep copy of the model gets one of its own.
            module.forward = functools.partial(_embedded, module)  # type: ignore[method-assign]


def head_bytes(head: nn.Module) -> int:
    """Bytes of a head that can be used in pieces, where it is split; else 0."""
    own = list(head.parameters())
    weight = own[0] if own and getattr(head, "takes_row_pieces", False) else None
    if weight is None or any(p.requires_grad or not is_partitioned(p) for p in own) or "forward" in head.__dict__:
        return 0
    return math.prod(full_shape(weight)) * weight.element_size() if split_rows(weight) is not None else 0


def _is_looked_up(table: nn.Embedding) -> bool:
    own = list(table.parameters())
    if len(own) != 1 or own[0].requires_grad or table.max_norm is not None or split_rows(own[0]) is None:
        return False
    if "forward" in table.__dict__ and getattr(table.forward, "func", None) is not _embedded:
        return False
    return math.prod(full_shape(own[0])) * own[0].element_size() >= LOOKED_UP_FROM


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
