"""The optimizers that have made a step, of whatever loop: who has no engine of ours at hand finds a parameter's moments so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_STEPPED: WeakSet[torch.optim.Optimizer] = WeakSet()
_WATCHING: list[Any] = []


@dataclass
class _Due:
    """A function, and how many steps are left until it is called."""

    steps: int
    function: Callable[[], None]


_DUE: list[_Due] = []


def watch_optimizers() -> None:
    """Local: from now on remember (weakly) every optimizer that makes a step, DeepSpeed's inner ones among them."""
    if not _WATCHING:
        _WATCHING.append(register_optimizer_step_post_hook(_after_step))


def after_steps(steps: int, function: Callable[[], None]) -> None:
    """Local: call the function once, when optimizers, which are watched, have made so many steps from now on."""
    _DUE.append(_Due(steps, function))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _STEPPED.add(optimizer)
    for due in list(_DUE):
        due.steps -= 1
        if due.steps <= 0:
            _DUE.remove(due)
            due.function()


def stepped() -> Iterable[torch.optim.Optimizer]:
    """Those that have made a step since, and still exist."""
    return _STEPPED
