"""What an adapter's file holds of a method besides its trained parameters, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_subspace.subspace.core.part import SubspacePart


class FileOptions(SubspacePart):
    """A method whose file holds less than what was trained: loaded, it has other options."""

    @classmethod
    def file_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a part has which is loaded from a file."""
        raise NotImplementedError


class FrozenInFile(SubspacePart):
    """A method whose file holds frozen parameters too, because PEFT's layout has them there."""

    def frozen_in_file(self) -> dict[str, nn.Parameter]:
        """Them, by suffix, as `file_tensors` has them. One that begins with `base_model.` is the whole name: a tensor of the
        model, which one of its parts holds."""
        raise NotImplementedError


def frozen_in_file(part: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters that an adapter's file holds of this module, by suffix."""
    return part.frozen_in_file() if isinstance(part, FrozenInFile) else {}


def file_options_of(method: type[SubspacePart], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a part of the method has which is loaded from a file."""
    return method.file_options(options) if issubclass(method, FileOptions) else dict(options)
