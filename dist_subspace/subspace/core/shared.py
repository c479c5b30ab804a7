"""What the layers of a method have in common: random projections, a width, which of them scale their input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_subspace.subspace.core.linear import SubspaceLinear
from dist_subspace.subspace.core.operator import Operator
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.spec import Settings


class SharedAcrossLayers(SubspaceLinear):
    """A method that makes something once for all of its sites."""

    @classmethod
    def make_shared(cls, sites: Mapping[str, nn.Module], settings: Settings) -> Any:
        """What all parts have in common. Raises UsageError for settings that do not go with the sites."""
        raise NotImplementedError

    def take_shared(self, shared: Any) -> None:
        """Called before `create`; `shared` is None for a layer that stands alone."""

    @classmethod
    def build(cls, site: nn.Module, settings: Settings, generator: torch.Generator, shared: Any = None) -> SubspacePart:
        assert isinstance(site, Operator)
        part = cls(site, settings)
        part.take_shared(shared)
        part.create(settings, generator)
        return part


def shared_of(method: type[SubspacePart], sites: Mapping[str, nn.Module], settings: Settings) -> Any:
    """What all parts of the method have in common; None where that is nothing."""
    return method.make_shared(sites, settings) if issubclass(method, SharedAcrossLayers) else None
