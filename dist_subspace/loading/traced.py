"""Which entries of a checkpoint a conversion of transformers puts where: it is run on tensors without values that remember.

What only stacks, joins, cuts, turns or looks at a tensor is followed; what does anything else is not, and such a tensor is made
as transformers makes it, from the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_subspace.loading.layout import Layout

# What says something of a tensor, and makes none.
_ANSWERS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.Size)


class NotFollowed(Exception):
    """A tensor is made in another way than from pieces of others."""


class Traced(Tensor):
    """A tensor without values (on the meta device), and where its values lie."""

    layout_in_file: Layout

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        result = super().__torch_function__(func, types, args, given)
        if isinstance(result, _ANSWERS):
            return result
        rule = _RULES.get(getattr(func, "__name__", ""))
        if rule is None or result is None:
            raise NotFollowed(getattr(func, "__name__", str(func)))
        made = list(result) if isinstance(result, (tuple, list)) else [result]
        shapes = [tuple(Tensor.size(tensor.as_subclass(Tensor))) for tensor in made]
        layouts = rule(shapes, *args, **given)
        for tensor, shape, layout in zip(made, shapes, layouts, strict=True):
            if layout.shape != shape:
                raise NotFollowed(func.__name__)
            tensor.layout_in_file = layout
        return result


def traced(key: str, shape: Sequence[int], dtype: torch.dtype) -> Traced:
    """A tensor of the checkpoint."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(Traced)
    tensor.layout_in_file = Layout.of(key, shape)
    return tensor


Shapes = list[tuple[int, ...]]


def _of(tensor: Any) -> Layout:
    if not isinstance(tensor, Traced):
        raise NotFollowed("a tensor of another kind")
    return tensor.layout_in_file


def _same(shapes: Shapes, tensor: Any, *_: Any, **__: Any) -> list[Layout]:
    return [_of(tensor)]


def _stack(shapes: Shapes, tensors: Sequence[Any], dim: int = 0) -> list[Layout]:
    return [Layout.cat([_of(tensor).unsqueeze(dim % len(shapes[0])) for tensor in tensors], dim)]


def _cat(shapes: Shapes, tensors: Sequence[Any], dim: int = 0) -> list[Layout]:
    return [Layout.cat([_of(tensor) for tensor in tensors], dim)]


def _cut(shapes: Shapes, tensor: Any, _: Any = None, dim: int = 0, **__: Any) -> list[Layout]:
    """One piece after the other, as long as they have come out."""
    whole, place, layouts = _of(tensor), 0, []
    for shape in shapes:
        layouts.append(whole.narrow(dim, place, shape[dim]))
        place += shape[dim]
    return layouts


def _unbind(shapes: Shapes, tensor: Any, dim: int = 0) -> list[Layout]:
    return [_of(tensor).narrow(dim, place, 1).squeeze(dim) for place in range(len(shapes))]


def _narrow(shapes: Shapes, tensor: Any, dim: int, start: int, length: int) -> list[Layout]:
    return [_of(tensor).narrow(dim, start, length)]


def _select(shapes: Shapes, tensor: Any, dim: int, index: int) -> list[Layout]:
    return [_of(tensor).narrow(dim, index % _of(tensor).shape[dim], 1).squeeze(dim)]


def _transpose(shapes: Shapes, tensor: Any, dim0: int, dim1: int) -> list[Layout]:
    return [_of(tensor).transpose(dim0, dim1)]


def _t(shapes: Shapes, tensor: Any) -> list[Layout]:
    return [_of(tensor).permute(tuple(range(len(shapes[0])))[::-1])]


def _permute(shapes: Shapes, tensor: Any, *dims: Any, **given: Any) -> list[Layout]:
    order = given.get("dims", dims[0] if dims and not isinstance(dims[0], int) else dims)
    return [_of(tensor).permute([dim % len(shapes[0]) for dim in order])]


def _squeeze(shapes: Shapes, tensor: Any, dim: int) -> list[Layout]:
    return [_of(tensor) if _of(tensor).shape == shapes[0] else _of(tensor).squeeze(dim)]


def _unsqueeze(shapes: Shapes, tensor: Any, dim: int) -> list[Layout]:
    return [_of(tensor).unsqueeze(dim)]


def _view(shapes: Shapes, tensor: Any, *_: Any, **__: Any) -> list[Layout]:
    try:
        return [_of(tensor).view(shapes[0])]
    except ValueError as error:
        raise NotFollowed("view") from error


_RULES: dict[str, Callable[..., list[Layout]]] = {
    **dict.fromkeys(("contiguous", "clone", "detach"), _same),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _cut),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("view", "reshape", "flatten"), _view),
    "stack": _stack,
    "unbind": _unbind,
    "narrow": _narrow,
    "select": _select,
    "t": _t,
    "permute": _permute,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
}
