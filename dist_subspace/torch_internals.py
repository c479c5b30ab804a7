"""What is asked of torch below its public surface: which matrix products its CPU library has, and a shape without a view.

Tried on torch 2.13 alone; tests/test_torch_internals.py fails when an operator moves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def reshaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A new, contiguous tensor in another shape, as a tensor of its own and not a view (`aten::_unsafe_view`), for who gives
    `fresh` away with it: what leaves an autograd function as a view must not be changed in place, and models do that."""
    own: Tensor = torch.ops.aten._unsafe_view(fresh, shape)
    return own


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix products in `dtype`; torch takes a plain loop where it has none."""
    if dtype in (torch.bfloat16, torch.float16) and not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
