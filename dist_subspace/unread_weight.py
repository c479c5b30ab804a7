"""A weight that may be asked about, but not computed with: what a layer shows in the place of a matrix that it has not.

Models ask their layers for `weight.dtype` or `weight.device` (T5 does, of `wo`), and some compute with `weight` and never call
the layer. The bytes of a packed matrix, or the matrix of a layer with a method, would give them a wrong result without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.torch_internals import valueless_tensor, without_overrides

# What says something about a tensor and reads none of its values.
# fmt: off
_PROPERTIES = (
    "dtype", "device", "shape", "layout", "ndim", "requires_grad", "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized",
    "is_xpu", "is_mps", "is_leaf", "grad", "grad_fn", "itemsize", "data", "names", "nbytes",
)
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device",
    "__hash__", "__len__", "detach",
)
# fmt: on
_HARMLESS = {f"torch.Tensor.{name}.__get__" for name in _PROPERTIES} | {f"torch.Tensor.{name}" for name in _METHODS}


class UnreadWeight(Tensor):
    """Of a real weight the type, the shape and the device. Whatever would read its values is refused (UsageError)."""

    reason: str
    stored: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = torch.overrides.resolve_name(func)
        weight = next((a for a in _flat((args, kwargs or {})) if isinstance(a, UnreadWeight)), None)
        if name in ("torch.Tensor.data.__get__", "torch.Tensor.detach"):
            return weight  # whose type or device is asked next
        with without_overrides():
            if name in _HARMLESS:
                return func(*args, **(kwargs or {}))
            raise UsageError("a weight is read that cannot be" if weight is None else weight.reason)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        weight = next((a for a in _flat((args, kwargs or {})) if isinstance(a, UnreadWeight)), None)
        raise UsageError("a weight is read that cannot be" if weight is None else weight.reason)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"UnreadWeight({self.reason!r})"

    def __getattr__(self, name: str) -> Any:
        """What a library has put on the real parameter (a sharding engine's marks)."""
        if name in ("stored", "reason"):
            raise AttributeError(name)
        return getattr(self.stored, name)


def unread_weight(stored: Tensor, shape: Sequence[int], dtype: torch.dtype, reason: str) -> Tensor:
    """Something to ask about a weight `(d_out, d_in)` of type `dtype`, whose bytes `stored` holds in some form.

    Arguments:
        reason: the sentence of the error that reading its values raises.
    """
    weight = valueless_tensor(UnreadWeight, shape, dtype, stored.device)
    weight.stored, weight.reason = stored, reason
    return weight  # type: ignore[no-any-return]


def weight_under_a_method(stored: Tensor, shape: Sequence[int], layer: str, method: str) -> Tensor:
    """What a layer with a method on it shows as its weight: who computed with that would pass the method by."""
    reason = (
        f"the model reads the weight of {layer}, which has method {method} on it, instead of calling the layer: what is trained "
        "there would be passed by; accepted: subspace.exclude_modules with that layer"
    )
    return unread_weight(stored, shape, stored.dtype, reason)


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value
