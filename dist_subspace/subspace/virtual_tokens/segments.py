"""Samples that share a row: the only sign of a border is that `position_ids` do not grow by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dist_subspace.torch_internals import version

# Reading borders off a GPU tensor waits for the GPU: once a forward, not once a layer. A memo of a pure function.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def segments(position_ids: Tensor, batch: int) -> list[list[int]] | None:
    """For each row the edges of its segments, 0 and t included; None where every row is one segment.

    A border is where the position does not grow by one, which is transformers' own rule.
    """
    if position_ids.ndim != 2:
        return None
    # The version tells a tensor that was written over in place from the one that was read.
    key = (batch, -1 if position_ids.is_inference() else version(position_ids))
    known: dict[tuple[int, int], list[list[int]] | None] = _known.setdefault(position_ids, {})
    if key in known:
        return known[key]
    rows = position_ids.expand(batch, -1)
    length = rows.shape[1]
    row, place = (rows.diff(dim=-1) != 1).nonzero(as_tuple=True)
    edges: list[list[int]] = [[0] for _ in range(batch)]
    for r, p in zip(row.tolist(), place.tolist(), strict=True):
        edges[r].append(p + 1)
    known[key] = [[*starts, length] for starts in edges] if len(row) else None
    return known[key]


def kernel_lengths(position_ids: Tensor) -> dict[str, Any]:
    """The segments of packed rows as flash attention takes them: ends over the flattened rows, and the longest."""
    starts = (position_ids.reshape(-1) == 0).nonzero().reshape(-1)
    ends = torch.cat([starts, starts.new_tensor([position_ids.numel()])])
    longest = int(ends.diff().max())
    edges = ends.to(torch.int32)
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
