"""Where a module stands in a model, and what is hung on it: both go over to the one that takes its place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def replace_everywhere(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules (old -> new) in every place that an old one still has: a layer may be a part of several modules. Inside the
    new ones, which may hold the old, nothing changes."""
    new = set(made.values())
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()) if parent not in new else ():
            if module is not None and module in made:
                setattr(parent, child, made[module])


def move_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give a module's hooks to the one that takes its place; the handles that remove them do so from there."""
    for name in _HOOKS:
        hooks = getattr(module, name)
        if hooks:
            setattr(module, name, getattr(other, name))
            setattr(other, name, hooks)
    other._is_full_backward_hook = module._is_full_backward_hook
