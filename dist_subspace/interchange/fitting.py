"""Whether an adapter's layers are those of a model, which is only looked at. Local."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.storage import is_linear
from dist_subspace.storage.adopt import linear_shape
from dist_subspace.subspace import Operator

Shapes = dict[str, tuple[int | None, int | None]]


def check_layers(model: nn.Module, shapes: Mapping[str, Sequence[int | None]]) -> None:
    """Raises UsageError for a model that lacks a layer of the adapter, or whose layer has another shape.

    Arguments:
        shapes: `(d_out, d_in)` of the adapter's linear layers by name, None for a side that is not known.
    """
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        found = _shape_of(modules.get(name))
        if found is None:
            raise UsageError(
                f"the adapter is for {name}, which is no linear layer of this model ({type(model).__name__}): it belongs to "
                f"another base model; layers here are for example: {', '.join(_examples(model))}"
            )
        if any(own is not None and own != theirs for own, theirs in zip(shape, found, strict=True)):
            wanted = " x ".join("?" if size is None else str(size) for size in shape)
            raise UsageError(
                f"the adapter is for a {name} of {wanted}, but this model's is {found[0]} x {found[1]}: it belongs to "
                "another base model"
            )


def _shape_of(module: nn.Module | None) -> tuple[int, int] | None:
    """`(d_out, d_in)` of a linear layer, whoever made it."""
    if isinstance(module, Operator):
        return module.out_features, module.in_features
    if module is not None and (is_linear(module) or hasattr(module, "in_features")):
        return linear_shape(module)
    return None


def _examples(model: nn.Module) -> list[str]:
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Operator) or is_linear(module):
            kinds.setdefault(name.rpartition(".")[2], name)
    return list(kinds.values())[:4]
