"""The optimizers that have made a step, of whatever loop: who has no engine of ours at hand finds a parameter's moments so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_STEPPED: WeakSet[torch.optim.Optimizer] = WeakSet()
_WATCHING: list[Any] = []


def watch_optimizers() -> None:
    """Local: from now on remember (weakly) every optimizer that makes a step, DeepSpeed's inner ones among them."""
    if not _WATCHING:
        _WATCHING.append(register_optimizer_step_post_hook(lambda optimizer, args, kwargs: _STEPPED.add(optimizer)))


def stepped() -> Iterable[torch.optim.Optimizer]:
    """Those that have made a step since, and still exist."""
    return _STEPPED
