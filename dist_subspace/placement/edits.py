"""Edits of trained parameters in the middle of training, in anyone's loop: written wherever a copy of the parameter lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import any_rank, max_over_ranks
from dist_subspace.placement.deepspeed import pieces as deepspeed_pieces
from dist_subspace.placement.optimizer_state import set_step
from dist_subspace.placement.protocol import OptimizerPieces
from dist_subspace.placement.tensors import full_shape, read_by_forward
from dist_subspace.placement.whole import parameters as whole_parameters

_DEEPSPEED: OptimizerPieces = deepspeed_pieces
_PLAIN: OptimizerPieces = whole_parameters


def _pieces(parameter: nn.Parameter) -> OptimizerPieces:
    return _DEEPSPEED if _DEEPSPEED.holds(parameter) else _PLAIN


class Edit(Protocol):
    """Write `value` where `where` is true (both broadcast to the parameter's shape); with `moments`, these become zero there."""

    @property
    def parameter(self) -> nn.Parameter: ...

    @property
    def where(self) -> Tensor: ...

    @property
    def value(self) -> Tensor | float: ...

    @property
    def moments(self) -> bool: ...


def apply_edits(edits: Iterable[Edit]) -> None:
    """Local, alike on every rank: write each edit in place wherever this rank holds a part of it: the parameter, its shard, its
    fp32 master, the optimizer's moments. Moments that do not exist yet will begin at zero."""
    with torch.no_grad():
        for edit in edits:
            _apply(edit)


def _apply(edit: Edit) -> None:
    shape, pieces = full_shape(edit.parameter), _pieces(edit.parameter)
    where = edit.where.expand(shape).reshape(-1)
    value = edit.value.expand(shape).reshape(-1) if isinstance(edit.value, Tensor) else edit.value
    for held, first in read_by_forward(edit.parameter):
        _write_where(held, first, where, value)
    pieces.edit_master(edit.parameter, lambda held, first: _write_where(held, first, where, value))
    if edit.moments:
        pieces.clear_moments(edit.parameter, lambda held, first, zero: _write_where(held, first, where, zero))


def _write_where(held: Tensor, first: int, where: Tensor, value: Tensor | float) -> None:
    """Into a flat tensor whose first element is number `first` of the whole; padding lies beyond the whole."""
    length = min(held.numel(), where.numel() - first)
    if length <= 0:
        return
    overlap, mask = held[:length], where[first : first + length].to(held.device)
    if isinstance(value, Tensor):
        overlap.copy_(torch.where(mask, value[first : first + length].to(overlap), overlap))
    else:
        overlap.masked_fill_(mask, value)


def check_editable(parameter: nn.Parameter) -> None:
    """Local: refuse an optimizer that keeps a master copy where nobody else finds it, once it has made a step.

    Raises:
        UsageError: a 16-bit parameter that is not split and that no optimizer knows (a 16-bit engine of another loop, without
            ZeRO).
    """
    if not _pieces(parameter).is_reached(parameter):
        raise UsageError(
            f"the optimizer keeps float32 copies of {str(parameter.dtype).removeprefix('torch.')} parameters where a method's "
            "schedule cannot reach them; accepted: a ZeRO stage from 1 on, or an engine without bf16 and fp16"
        )


# Step counters, on which Adam's bias correction hangs.


def restart_counters(parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> int | None:
    """Collective: let the optimizer count the steps of `parameters` from here on; returns how many it had counted.

    None where that cannot be done: an optimizer without counters, or one that counts them together with some of `others` (a
    ZeRO stage from 1 on counts a parameter group as one). Then nothing is changed.
    """
    counters, rest = _counters(parameters), {id(state) for state in _counters(others)}
    if any_rank(any(id(state) in rest for state in counters)):
        return None
    count = int(max_over_ranks(max((int(state["step"]) for state in counters), default=0)))
    set_counters(parameters, 0)
    return count or None


def set_counters(parameters: Sequence[nn.Parameter], steps: int) -> None:
    """Local, alike on every rank: the optimizer has made this many steps with these parameters."""
    for state in _counters(parameters):
        set_step(state, steps)


def _counters(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    entries = [_pieces(parameter).counter(parameter) for parameter in parameters]
    return list({id(state): state for state in entries if "step" in state}.values())
