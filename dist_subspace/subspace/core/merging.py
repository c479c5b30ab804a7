"""Merging into a module that is no linear operator."""

from __future__ import annotations

from torch import Tensor, nn

from dist_subspace.subspace.core.part import SubspacePart


class MergesIntoNorm(SubspacePart):
    """A part in the place of a norm, whose weight and bias the merged model has changed."""

    base: nn.Module  # the frozen norm

    def merged(self, weight: Tensor) -> Tensor:
        """The norm's weight, float32; parameters are whole."""
        raise NotImplementedError

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """Its bias from the frozen one, float32 (None: it has none)."""
        raise NotImplementedError
