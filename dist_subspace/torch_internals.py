"""What is asked of torch below its public surface.

Tried on torch 2.13 alone; tests/test_torch_internals.py fails when what is used here moves. The dictionaries of a module are in
module_places.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

if TYPE_CHECKING:

    class TensorFunction(torch.autograd.Function):
        """An autograd function of one result. torch declares no types for `apply`."""

        @classmethod
        def apply(cls, *args: Any) -> Tensor: ...
else:
    TensorFunction = torch.autograd.Function


def reshaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A new, contiguous tensor in another shape, as a tensor of its own and not a view (`aten::_unsafe_view`), for who gives
    `fresh` away with it: what leaves an autograd function as a view must not be changed in place, and models do that."""
    in_shape: Tensor = torch.ops.aten._unsafe_view(fresh, shape)
    return in_shape


def version(tensor: Tensor) -> int:
    """How often the tensor was written over in place: a number that tells its values from earlier ones (`_version`)."""
    return tensor._version


def viewed(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of; None for one of its own (`_base`)."""
    return tensor._base


def in_backward() -> bool:
    """Whether this thread is within a backward of autograd (`_current_graph_task_id`), where reentrant activation checkpointing
    runs a forward again."""
    return torch._C._current_graph_task_id() != -1


def without_overrides() -> AbstractContextManager[Any]:
    """Within it `__torch_function__` of subclasses is not asked (`DisableTorchFunctionSubclass`)."""
    return torch._C.DisableTorchFunctionSubclass()


def valueless_tensor(kind: type[Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of the subclass `kind` that says a shape, a type and a device and has no values (`_make_wrapper_subclass`)."""
    return Tensor._make_wrapper_subclass(kind, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]


def set_collective_timeout(timeout: timedelta) -> None:
    """Local: from now on so long for each collective of the groups that this process has made (`_set_pg_timeout`); a later group
    has its maker's own."""
    for group in list(distributed_c10d._world.pg_map):
        with suppress(ValueError):  # a group that this rank is not in
            distributed_c10d._set_pg_timeout(timeout, group)


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`x_g M_g` for the rows x_g of each group, which end at `ends` (int32), and `M (groups, in, out)`; strides of whole 16
    bytes. `torch.nn.functional` has it from 2.10 on; the function that it calls (`torch._grouped_mm`) is older."""
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    made: Tensor = product(rows, matrices, offs=ends)
    return made


@functools.cache
def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies groups of rows in one kernel: CUDA from compute capability 8.0 on, in bfloat16. In other
    types torch loops, as it does on a CPU."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
