"""Samples that share a row: the only sign of a border is that `position_ids` do not grow by one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dist_subspace.torch_internals import version

# Reading borders off a GPU tensor waits for the GPU: once a forward, not once a layer. A memo of a pure function.
_edges: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def segments(position_ids: Tensor, batch: int) -> list[list[int]] | None:
    """The edges of each row's samples, 0 and t included; None where every row is one sample.

    A border is where the position does not grow by one, which is transformers' own rule.
    """
    if position_ids.ndim != 2:
        return None
    # The version tells a tensor that was written over in place from the one that was read.
    key = (batch, -1 if position_ids.is_inference() else version(position_ids))
    known: dict[tuple[int, int], list[list[int]] | None] = _edges.setdefault(position_ids, {})
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


def longest_sample(edges: list[list[int]] | None, length: int) -> int:
    """Tokens of the longest sample in rows of `length` tokens; edges: what `segments` says of the rows."""
    return length if edges is None else max(end - start for row in edges for start, end in pairwise(row))


def kernel_lengths(position_ids: Tensor) -> dict[str, Any]:
    """The samples of packed rows as flash attention takes them: their ends over the flattened rows, and the longest."""
    starts = (position_ids.reshape(-1) == 0).nonzero().reshape(-1)
    ends = torch.cat([starts, starts.new_tensor([position_ids.numel()])])
    longest = int(ends.diff().max())
    edges = ends.to(torch.int32)
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
