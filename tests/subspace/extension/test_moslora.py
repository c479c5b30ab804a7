"""MoSLoRA: golden numbers and the two kinds of mixer."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.subspace.extension.moslora import orthogonal
from tests.subspace.golden import A, B, W, X, give, layer

G = torch.tensor([[1.0, 0.5], [-1, 2]])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("alpha", "expected"), [(4.0, [7.5, 0, -5]), (2.0, [4, 2, -0.5])])
def test_forward_is_the_golden_one(alpha: float, expected: list[float], transposed: bool) -> None:
    module = layer("moslora", rank=2, alpha=alpha, transposed=transposed)
    torch.testing.assert_close(give(module, lora_A=A, lora_B=B, lora_G=G)(X), torch.tensor([expected]))


def test_b_is_zero_at_the_start_and_the_mixer_kaiming_uniform() -> None:
    module = layer("moslora", rank=3)
    assert not module.lora_B.any()
    assert module.lora_G.std() > 0.1 and module.lora_G.abs().max() <= 3**-0.5


def test_an_orthogonal_mixer_keeps_lengths_and_is_no_triangle() -> None:
    mixer = layer("moslora", rank=3, options={"mixer": "orthogonal"}).lora_G
    torch.testing.assert_close(mixer @ mixer.t(), torch.eye(3))
    assert mixer.tril(-1).any() and mixer.triu(1).any()


def test_orthogonal_mixers_are_uniform_over_all_of_them() -> None:
    """A QR decomposition's own factor has a first entry that is never positive: half of all rotations would be left out."""
    drawn = torch.stack([orthogonal(4, torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert drawn.mean(0).abs().max() < 0.1  # of entries with spread 1/2
    assert 0.4 < float((torch.linalg.det(drawn) > 0).float().mean()) < 0.6


def test_only_b_learns_in_the_first_step() -> None:
    module = layer("moslora", rank=2)
    module(X).sum().backward()
    assert module.lora_B.grad.any() and not module.lora_A.grad.any() and not module.lora_G.grad.any()


def test_it_is_exactly_a_lora() -> None:
    module = give(layer("moslora", rank=2, alpha=4.0), lora_A=A, lora_B=B, lora_G=G)
    down, up = module.low_rank_form()
    torch.testing.assert_close(W + up @ down, module.merged(W))


def test_eighteen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("moslora", rank=2).trainables().values()) == 18
