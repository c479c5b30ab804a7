"""Modules whose weights ZeRO-3 does not gather when they are called, because they are used where they lie.

Read against deepspeed 0.19.8 (`runtime/zero/parameter_offload.py`, `runtime/zero/partition_parameters.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_apart.py fails when it moves.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_HOOKS = ("deepspeed.runtime.zero.parameter_offload", "deepspeed.utils.nvtx")  # the second wraps some of the first


def is_gathered_when_called(module: nn.Module) -> bool:
    """Whether an engine's hooks hang on the module (`_register_deepspeed_module`); those of a leaf's inside have none."""
    return any(_own_hooks(module))


def set_apart(module: nn.Module) -> None:
    """Local, alike on every rank: take the engine's hooks off the module, which gather its parameters and release them."""
    for hooks, key in list(_own_hooks(module)):
        del hooks[key]


def _own_hooks(module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            if getattr(hook, "__module__", None) in _HOOKS:
                yield hooks, key


def show_shards(module: nn.Module) -> None:
    """Local: who asks the module for a split parameter finds its type and device and no entries. An engine lets whoever asks
    within a forward have it gathered, and from then on with that module at every call (`ZeROOrderedDict.__getitem__`)."""
    kind = _quiet_dict()
    if not isinstance(module._parameters, kind):
        held = kind(parent_module=module)
        for name, parameter in module._parameters.items():
            held[name] = parameter
        module._parameters = held


@functools.cache
def _quiet_dict() -> Any:
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

    class Quiet(ZeROOrderedDict):  # type: ignore[misc]
        """Of the class that the engine looks for before each forward (`ensure_zero_ordered_dict`)."""

        def __getitem__(self, key: str) -> Any:
            return OrderedDict.__getitem__(self, key)

    return Quiet


@contextmanager
def marked_whole(parameter: Any, whole: bool) -> Iterator[None]:
    """Within the block the engine takes a split parameter for gathered, or for not gathered, whatever is here (`ds_status`): what
    is marked whole nobody gathers by asking a module for it."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    before = parameter.ds_status
    parameter.ds_status = ZeroParamStatus.AVAILABLE if whole else ZeroParamStatus.NOT_AVAILABLE
    try:
        yield
    finally:
        parameter.ds_status = before
