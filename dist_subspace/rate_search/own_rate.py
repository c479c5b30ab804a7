"""The method's own rate on a model that carries it: the centre of a grid."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from dist_subspace.families.configuration import text_config
from dist_subspace.subspace import SuggestedRate, attached, suggested_rate


def own_rate(model: nn.Module) -> SuggestedRate:
    """Local, alike on every rank: what the method of an attached model declares for its width."""
    return suggested_rate(attached(model).config, _width(model))


def _width(model: nn.Module) -> int:
    """The most frequent number of inputs of the layers with a part of the method; of virtual tokens, the embedding's width."""
    layers: list[Any] = [model.get_submodule(name) for name in attached(model).layers]
    widths = Counter(int(layer.in_features) for layer in layers if hasattr(layer, "in_features"))
    if widths:
        return widths.most_common(1)[0][0]
    bare: Any = model
    return int(text_config(bare.config).hidden_size)
