"""Decorators that compile do so when the function is called, and not while its library is imported.

bitsandbytes and DeepSpeed's optimizers decorate functions by `torch.compile` at their import, which brings the whole compiler of
torch: half of the time that a start takes for its imports, whether or not one of these functions is ever called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """Within the block `torch.compile` gives functions that are compiled at their first call."""
    real = torch.compile

    def later(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(later, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(model)
        def call(*arguments: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(real(model, **options))
            return compiled[0](*arguments, **named)

        return call

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = real
