"""Layers that others made become frozen operators with the same output, and nothing is copied or untied."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dist_subspace.errors import UsageError
from dist_subspace.storage import FrozenLinear, adopt, adopt_all, left_alone

WIDTHS = (172, 64)  # (out, in)


def linear4bit(quant_type: str, double_quant: bool, quant_storage: torch.dtype) -> nn.Module:
    return bitsandbytes.nn.Linear4bit(
        WIDTHS[1],
        WIDTHS[0],
        compute_dtype=torch.float32,
        quant_type=quant_type,
        compress_statistics=double_quant,
        quant_storage=quant_storage,
    ).to("cpu")


def linear8bit() -> nn.Module:
    return bitsandbytes.nn.Linear8bitLt(WIDTHS[1], WIDTHS[0], has_fp16_weights=False).to("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_linear_layer_keeps_its_parameters_and_its_output(bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(WIDTHS[1], WIDTHS[0], bias=bias, dtype=dtype)
    frozen = adopt(layer)
    assert frozen is not None and frozen.shape == WIDTHS
    assert frozen.weight is layer.weight and frozen.bias is layer.bias
    assert not layer.weight.requires_grad
    x = torch.randn(3, WIDTHS[1], dtype=dtype)
    rounding = 2 * torch.finfo(dtype).eps  # the bias is added after the product was rounded
    torch.testing.assert_close(frozen(x), layer(x), rtol=rounding, atol=2 * rounding)


def test_a_conv1d_keeps_its_transposed_bytes_and_its_output() -> None:
    layer = Conv1D(WIDTHS[0], WIDTHS[1])
    nn.init.normal_(layer.bias)
    frozen = adopt(layer)
    assert frozen is not None and frozen.weight is layer.weight and frozen.shape == WIDTHS
    x = torch.randn(2, 3, WIDTHS[1], requires_grad=True)
    torch.testing.assert_close(frozen(x), layer(x))
    expected = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(frozen(x).sum(), x), expected)


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_bitsandbytes_4bit_layer_keeps_its_bytes_and_its_output(
    quant_type: str, double_quant: bool, quant_storage: torch.dtype
) -> None:
    layer = linear4bit(quant_type, double_quant, quant_storage)
    frozen = adopt(layer)
    assert frozen is not None and frozen.storage == quant_type and frozen.shape == WIDTHS
    assert frozen.packed().codes.data_ptr() == layer.weight.data_ptr()
    x = torch.randn(3, WIDTHS[1], requires_grad=True)  # a gradient keeps bitsandbytes from its inference kernels
    torch.testing.assert_close(frozen(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forwards", [0, 1])
def test_a_bitsandbytes_8bit_layer_keeps_its_bytes_and_its_output(forwards: int) -> None:
    layer = linear8bit()
    x = torch.randn(3, WIDTHS[1], requires_grad=True)
    codes = layer.weight.data.clone()
    for _ in range(forwards):
        layer(x)
    frozen = adopt(layer)
    assert frozen is not None and frozen.storage == "int8" and frozen.shape == WIDTHS
    assert torch.equal(frozen.codes, codes)
    # bitsandbytes quantises the activations too: near, not equal.
    torch.testing.assert_close(frozen(x), layer(x), rtol=0, atol=0.03)


def test_tied_parameters_stay_tied_and_shared_layers_shared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.first = nn.Linear(8, 8)
            self.again = self.first
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

    model = Model()
    assert set(adopt_all(model)) == {"first", "again", "head"}
    assert model.first is model.again and isinstance(model.first, FrozenLinear)
    assert model.head.weight is model.embedding.weight


def test_a_layer_of_another_kind_is_left_alone() -> None:
    class Gated(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sigmoid()

    for module in (Gated(3, 3), nn.LayerNorm(3), nn.Embedding(3, 3), nn.Conv1d(3, 3, 1)):
        assert adopt(module) is None


def test_an_operator_is_its_own_adoption() -> None:
    frozen = adopt(nn.Linear(3, 3))
    assert frozen is not None and adopt(frozen) is frozen


def test_layers_named_as_exceptions_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert adopt_all(model, except_for=["1"]) == ["0"]
    assert isinstance(model[1], nn.Linear)


def test_adoption_keeps_the_mode_of_training() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    adopt_all(model)
    assert not model[0].training


def test_a_weight_of_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match="float64"):
        adopt(nn.Linear(3, 3, dtype=torch.float64))


class Apart(nn.Linear):
    """Falcon's form: the bias is added apart."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Plain(nn.Linear):
    """A subclass for its name alone."""


class Scaled(nn.Linear):
    factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class Drawing(nn.Linear):
    """Its forward draws random numbers, which change nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0 * torch.rand(())


class OfEvaluation(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.training else y.round()


class WithMore(Plain):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))


class NeedsMore(nn.Linear):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * mask


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [Apart, Plain, Scaled, Drawing])
def test_a_subclass_that_computes_the_same_is_adopted(kind: type[nn.Linear], bias: bool) -> None:
    layer, x = kind(6, 4, bias=bias), torch.randn(2, 3, 6)
    before = torch.random.get_rng_state()
    frozen = adopt(layer)
    assert torch.equal(torch.random.get_rng_state(), before), "adoption drew random numbers of the caller's"
    assert frozen is not None and frozen.weight is layer.weight
    torch.testing.assert_close(frozen(x), layer(x))


def test_a_subclass_that_computes_something_else_stays_what_it_is() -> None:
    doubled = Scaled(3, 3)
    doubled.factor = 2.0
    layers = {"doubled": doubled, "rounds": OfEvaluation(3, 3), "more": WithMore(3, 3), "needs": NeedsMore(3, 3)}
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.ModuleDict({**layers, "normed": parametrized, "plain": nn.Linear(3, 3)})
    assert adopt_all(model) == ["plain"]
    reasons = left_alone(model)
    assert set(reasons) == {*layers, "normed"} and "Scaled, computes something else" in reasons["doubled"]
