"""What 4-bit bytes mean, by the definition alone: no kernel of bitsandbytes, whose first call compiles one."""

from __future__ import annotations

import torch
from bitsandbytes import functional as reference
from torch import Tensor


def decoded_by_table(codes: Tensor, state: reference.QuantState, shape: tuple[int, int]) -> Tensor:
    """Dequantisation by its definition: table entry times the block's absmax; the first of two values is the high half."""
    absmax = state.absmax
    if state.nested:
        absmax = state.state2.code[absmax.long()] * state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = absmax + state.offset
    numel = shape[0] * shape[1]
    flat = codes.view(-1).long()
    values = state.code[torch.stack([flat >> 4, flat & 15], 1).view(-1)[:numel]]
    return (values * absmax.repeat_interleave(state.blocksize)[:numel]).view(shape)
