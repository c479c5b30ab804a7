"""What dpo and kto compare the model with: the model as the run begins, of the same frozen bytes and in no second copy.

Where a run begins at its method's own start, that is the base without the adapter. Where it begins with an adapter
(`subspace.init_from`), or with tokens that the base does not know, it is the adapter as it was then: its parameters, which are
few, are kept, and stand in the place of the trained ones while the reference is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dist_subspace.config import Config
from dist_subspace.subspace import disabled, named_trainables


class Reference:
    """Made while the model is as the run begins, behind the engine that holds its parameters whole between steps."""

    def __init__(self, model: nn.Module, of_start: bool) -> None:
        """of_start: whether the reference is the adapter's start and not the base alone."""
        self.model, self._start = model, dict[str, Tensor]()
        if of_start:
            self._start = {name: p.detach().clone() for name, p in named_trainables(model).items()}

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Within the block the model computes what the reference computes; no gradient may be asked for."""
        if not self._start:
            with disabled(self.model):
                yield
            return
        trained = {name: (p, p.data) for name, p in named_trainables(self.model).items()}
        try:
            with torch.no_grad():
                for name, (parameter, _) in trained.items():
                    parameter.data = self._start[name]
            yield
        finally:
            for parameter, values in trained.values():
                parameter.data = values


def begins_with_more(config: Config) -> bool:
    """Whether the model, as a run with this configuration begins, is another one than its base."""
    return config.subspace.init_from is not None or bool(config.model.new_tokens)


def needs_beginning(config: Config) -> bool:
    """Whether a run that goes on still needs what it began with (`subspace.init_from`): its reference."""
    return config.training.objective in ("dpo", "kto") and config.subspace.init_from is not None
