"""TriLoRA: golden numbers with either scale, and its initial values."""

from __future__ import annotations

import pytest
import torch

from tests.subspace.golden import A, B, W, X, give, layer

E = torch.tensor([0.5, -1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("scale", "expected"), [("alpha/r", [3.5, 0, -1]), (1, [2, 2, 1.5])])
def test_forward_is_the_golden_one(scale: str | int, expected: list[float], transposed: bool) -> None:
    module = layer("trilora", rank=2, alpha=4.0, transposed=transposed, options={"scale": scale})
    torch.testing.assert_close(give(module, lora_A=A, lora_B=B, lora_E=E)(X), torch.tensor([expected]))


def test_the_core_is_zero_at_the_start_and_both_factors_kaiming_uniform() -> None:
    module = layer("trilora", rank=3)
    assert not module.lora_E.any()
    assert module.lora_A.std() > 0.1 and module.lora_A.abs().max() <= 4**-0.5
    assert module.lora_B.std() > 0.1 and module.lora_B.abs().max() <= 3**-0.5


def test_only_the_core_learns_in_the_first_step() -> None:
    module = layer("trilora", rank=2)
    module(X).sum().backward()
    assert module.lora_E.grad.any() and not module.lora_A.grad.any() and not module.lora_B.grad.any()


def test_it_is_exactly_a_lora() -> None:
    module = give(layer("trilora", rank=2, alpha=4.0), lora_A=A, lora_B=B, lora_E=E)
    down, up = module.low_rank_form()
    torch.testing.assert_close(W + up @ down, module.merged(W))


def test_sixteen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("trilora", rank=2).trainables().values()) == 16
