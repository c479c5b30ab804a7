"""What dpo and kto compare the model with: the model as the run begins, of the same frozen bytes and in no second copy.

Where a run begins at its method's own start, that is the base without the adapter. Where it begins with an adapter
(`subspace.init_from`), or with tokens that the base does not know, it is the adapter as it was then: its parameters, which are
few, are kept, and stand in the place of the trained ones while the reference is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from dist_subspace.config import Config
from dist_subspace.placement.tensors import gathered, with_data
from dist_subspace.subspace import disabled, named_trainables


class Reference:
    """Made while the model is as the run begins, in its engine. Both methods are collective where parameters are split."""

    def __init__(self, model: nn.Module, of_start: bool) -> None:
        """of_start: whether the reference is the adapter's start and not the base alone."""
        self.model, self._start = model, dict[str, Tensor]()
        if of_start:
            trained = named_trainables(model)
            with gathered(trained.values()):
                self._start = {name: p.detach().clone() for name, p in trained.items()}

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Within the block the model computes what the reference computes; no gradient may be asked for."""
        if not self._start:
            with disabled(self.model):
                yield
            return
        trained = named_trainables(self.model)
        # Before an engine's first step they are split, and what a forward gathers would stand in the place of the start.
        with gathered(trained.values()), with_data({p: self._start[name] for name, p in trained.items()}):
            yield


def begins_with_more(config: Config) -> bool:
    """Whether the model, as a run with this configuration begins, is another one than its base."""
    return config.subspace.init_from is not None or bool(config.model.new_tokens)


def needs_beginning(config: Config) -> bool:
    """Whether a run that goes on still needs what it began with (`subspace.init_from`): its reference."""
    return config.training.objective in ("dpo", "kto") and config.subspace.init_from is not None
