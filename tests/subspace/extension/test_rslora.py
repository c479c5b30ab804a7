"""rsLoRA: golden numbers, its scale, and PEFT's own layer."""

from __future__ import annotations

import pytest
import torch

from tests.subspace.golden import BIAS, A, B, X, give, layer
from tests.subspace.peft_reference import peft_model

GOLDEN = torch.tensor([[8.9852813742, 9.6568542495, -1.6568542495]])


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    module = give(layer("rslora", rank=2, alpha=4.0, transposed=transposed), lora_A=A, lora_B=B)
    torch.testing.assert_close(module(X), GOLDEN)


def test_the_scale_falls_with_the_root_of_the_rank() -> None:
    assert layer("rslora", rank=1, alpha=3.0).scale == 3.0
    assert layer("rslora", rank=2, alpha=4.0).scale == pytest.approx(4 / 2**0.5)


def test_peft_computes_the_same_from_the_file() -> None:
    module = give(layer("rslora", rank=2, alpha=4.0, bias=True), lora_A=A, lora_B=B)
    torch.testing.assert_close(peft_model(module)(X), GOLDEN + BIAS)
    assert not torch.allclose(peft_model(give(layer("lora", rank=2, alpha=4.0), lora_A=A, lora_B=B))(X), GOLDEN + BIAS)


def test_fourteen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("rslora", rank=2).trainables().values()) == 14
