"""The only file that touches torch below its public surface.

Read against torch 2.11 and 2.13 (`aten/src/ATen/native/mkldnn/Utils.h`); tests/test_torch_internals.py fails when it moves.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix products in `dtype`; torch takes a plain loop where it has none."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
