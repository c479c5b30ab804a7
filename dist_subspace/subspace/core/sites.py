"""Where a method's parts stand, where that is not on every targeted linear operator with any rank that fits into it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from dist_subspace.subspace.core.operator import Operator, Stack
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.spec import Settings
from dist_subspace.subspace.core.targets import Choice


class OwnSites(SubspacePart):
    """A method that chooses among the model's modules itself."""

    @classmethod
    def sites(cls, choice: Choice) -> dict[str, nn.Module]:
        """The modules that get a part, by name, in the model's order. Raises UsageError where there are none."""
        raise NotImplementedError


class OnModel(OwnSites):
    """A method of one part, which stands beside the whole model under a name of its own."""

    attribute: ClassVar[str]

    @classmethod
    def sites(cls, choice: Choice) -> dict[str, nn.Module]:
        return {"": choice.model}

    def connect(self, model: nn.Module) -> None:
        """Hook the part into the model, of which it is a module already."""
        raise NotImplementedError


class AddsPositions(SubspacePart):
    """A method that lengthens what the model reads."""

    @classmethod
    def added_positions(cls, settings: Settings) -> int:
        """How many of the model's positions the method takes for itself in each sample."""
        raise NotImplementedError


class OwnRankBound(SubspacePart):
    """A method whose rank is bounded by something else than the smaller side of its linear operator."""

    @classmethod
    def largest_rank(cls, site: nn.Module) -> int | None:
        """The largest rank that a part on this site can have; None where there is no bound."""
        raise NotImplementedError


def sites_of(method: type[SubspacePart], choice: Choice) -> dict[str, nn.Module]:
    """The modules that get a part, by name, in the model's order. Raises UsageError where there are none."""
    return method.sites(choice) if issubclass(method, OwnSites) else dict(choice.operators())


def largest_rank_of(method: type[SubspacePart], site: nn.Module) -> int | None:
    """The largest rank that a part of the method on this site can have; None where there is no bound."""
    site = site.operator(0) if isinstance(site, Stack) else site
    return method.largest_rank(site) if issubclass(method, OwnRankBound) else smaller_side(site)


def smaller_side(site: nn.Module) -> int | None:
    """Of a linear operator; None for another module."""
    return min(site.in_features, site.out_features) if isinstance(site, Operator) else None
