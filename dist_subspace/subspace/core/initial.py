"""Initial values that come from outside the part: from a tokenizer, and off the model that it stands on."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.spec import SubspaceConfig
from dist_subspace.subspace.core.trained import Gathered


class TextOptions(SubspacePart):
    """A method with options that are text."""

    @classmethod
    def read_text(cls, config: SubspaceConfig, tokenizer: Any) -> SubspaceConfig:
        """The configuration with token ids in the place of the texts; called where a run has a tokenizer."""
        raise NotImplementedError


class InitialFromModel(SubspacePart):
    """A method whose initial values are read off the model."""

    def read_initial_values(self, model: nn.Module, gathered: Gathered) -> None:
        """Collective where parameters are split; called once the part is on the model.

        Arguments:
            gathered: a context in which the given parameters are whole.
        """
        raise NotImplementedError
