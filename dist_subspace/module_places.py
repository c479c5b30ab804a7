"""Where a module stands in a model, what it holds by itself, and what is hung on it: the last goes over to the one that takes its
place. The dictionaries behind that are the ones that `nn.Module` of torch 2.13 has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules right below, by name; one under two names twice."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters, by name, those that it registered as None among them."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers, by name."""
    return module._buffers


def saved_buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own buffers that a checkpoint holds."""
    kept = {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return {name: buffer for name, buffer in kept.items() if buffer is not None}


def with_tensors(module: M, tensors: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor] | None = None) -> M:
    """A module of the same class and settings that has these tensors in the place of its parameters, and of the buffers that are
    given; any tensors, views among them. Cheap: nothing is copied, and what else the module has is shared."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = dict(tensors)
    other.__dict__["_buffers"] = {**module._buffers, **(buffers or {})}
    return other


def replace_everywhere(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in every place that an old one still has: a layer may be a part of several modules. Inside the new ones,
    which may hold the old, nothing changes.

    Arguments:
        replacements: old module -> new module.
    """
    new = set(replacements.values())
    for parent in list(model.modules()):
        for child, module in list(children_of(parent).items()) if parent not in new else ():
            if module is not None and module in replacements:
                setattr(parent, child, replacements[module])


def hook_names(module: nn.Module) -> tuple[int, ...]:
    """What is hung on the module's forward now: one number a hook, which is never given to another one."""
    return (*module._forward_pre_hooks, *module._forward_hooks)


def move_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give a module's hooks to the one that takes its place; the handles that remove them do so from there."""
    for name in _HOOKS:
        hooks = getattr(module, name)
        if hooks:
            setattr(module, name, getattr(other, name))
            setattr(other, name, hooks)
    other._is_full_backward_hook = module._is_full_backward_hook
