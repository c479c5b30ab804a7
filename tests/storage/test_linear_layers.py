"""Which layers are linear ones: those whose weight and product are what they seem to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from dist_subspace.storage.linear_layers import is_conv1d, is_linear, linear_shape


class AddsApart(nn.Linear):
    """As Falcon's: the same product, written otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scales(nn.Linear):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class DropsInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class TakesMore(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class HoldsMore(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(1))


def set_on_the_instance() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def scaled(factor: float) -> nn.Module:
    layer = Scales(4, 3)
    layer.factor = factor
    return layer


LAYERS: dict[str, tuple[Any, bool]] = {
    "linear": (lambda: nn.Linear(4, 3), True),
    "without a bias": (lambda: nn.Linear(4, 3, bias=False), True),
    "conv1d": (lambda: Conv1D(3, 4), True),
    "written otherwise": (lambda: AddsApart(4, 3), True),
    "written otherwise, without a bias": (lambda: AddsApart(4, 3, bias=False), True),
    "scaled by one": (lambda: scaled(1.0), True),
    "scaled": (lambda: scaled(2.0), False),
    "dropout in training": (lambda: DropsInTraining(4, 3), False),
    "a call that may say more": (lambda: TakesMore(4, 3), False),
    "a parameter more": (lambda: HoldsMore(4, 3), False),
    "weight normalisation": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), False),
    "pruned": (lambda: prune.identity(nn.Linear(4, 3), "weight"), False),
    "a forward of its own": (set_on_the_instance, False),
    "lazy": (lambda: nn.LazyLinear(3), False),
    "an embedding": (lambda: nn.Embedding(4, 3), False),
    "a convolution": (lambda: nn.Conv1d(4, 3, 1), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_linear_where_weight_and_product_are(name: str) -> None:
    make, linear = LAYERS[name]
    layer, state = make(), torch.random.get_rng_state()
    assert is_linear(layer) == linear
    assert torch.equal(torch.random.get_rng_state(), state), "looking drew random numbers"


def test_the_shape_is_out_times_in_also_where_the_weight_is_split() -> None:
    assert linear_shape(nn.Linear(4, 3)) == (3, 4) and linear_shape(Conv1D(3, 4)) == (3, 4)
    split = nn.Linear(4, 3)
    split.weight.data = torch.empty(0)
    assert linear_shape(split) == (3, 4)
    assert is_conv1d(Conv1D(3, 4)) and not is_conv1d(nn.Conv1d(4, 3, 1))
