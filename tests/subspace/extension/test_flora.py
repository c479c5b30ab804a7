"""FLoRA: golden numbers, its initial values, and what it is with special cores."""

from __future__ import annotations

import pytest
import torch

from tests.subspace.golden import A, B, W, X, give, layer

G = torch.tensor([[1.0, 0.5], [-1, 2]])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("alpha", "expected"), [(4.0, [7.5, 0, -5]), (2.0, [4, 2, -0.5])])
def test_forward_is_the_golden_one(alpha: float, expected: list[float], transposed: bool) -> None:
    module = layer("flora", rank=2, alpha=alpha, transposed=transposed)
    torch.testing.assert_close(give(module, lora_A=A, lora_B=B, lora_G=G)(X), torch.tensor([expected]))


def test_the_core_is_zero_at_the_start_and_both_factors_kaiming_uniform() -> None:
    module = layer("flora", rank=3)
    assert not module.lora_G.any()
    assert module.lora_A.std() > 0.1 and module.lora_A.abs().max() <= 4**-0.5
    assert module.lora_B.std() > 0.1 and module.lora_B.abs().max() <= 3**-0.5


def test_with_the_identity_between_its_factors_it_is_lora_and_with_a_diagonal_trilora() -> None:
    lora = give(layer("lora", rank=2, alpha=4.0), lora_A=A, lora_B=B)
    flora = give(layer("flora", rank=2, alpha=4.0), lora_A=A, lora_B=B, lora_G=torch.eye(2))
    torch.testing.assert_close(flora(X), lora(X))
    diagonal = torch.tensor([0.5, -1])
    trilora = give(layer("trilora", rank=2, alpha=4.0), lora_A=A, lora_B=B, lora_E=diagonal)
    torch.testing.assert_close(give(flora, lora_G=diagonal.diag())(X), trilora(X))


def test_it_is_exactly_a_lora() -> None:
    module = give(layer("flora", rank=2, alpha=4.0), lora_A=A, lora_B=B, lora_G=G)
    down, up = module.low_rank_form()
    torch.testing.assert_close(W + up @ down, module.merged(W))


def test_eighteen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("flora", rank=2).trainables().values()) == 18
