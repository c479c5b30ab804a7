"""LoRA-XS: against its definition in float64, and the part of W that a core of one adds once more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dist_subspace.subspace.blocks.svd import largest
from tests.subspace.golden import W, X, give, layer

R = torch.tensor([[1.0, 0.5], [-1, 2]])
# Of the fixture's matrix, the largest singular triplet as a matrix.
FIRST = torch.tensor(
    [
        [0.4694253848, -0.7056981159, -0.4433966401, 1.4897364712],
        [-0.8297265258, 1.2473472141, 0.7837197681, -2.6331636646],
        [1.0291922809, -1.5472087302, -0.9721255265, 3.2661746176],
    ]
)


def defined(core: torch.Tensor, scale: float) -> Any:
    """`W + γ U_r Σ_r R V_rᵀ`, the largest entry of each u positive."""
    w = W.numpy().astype(np.float64)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    u, vt, r = u * signs, vt * signs[:, None], len(core)
    return w + scale * (u[:, :r] * s[:r]) @ core.numpy().astype(np.float64) @ vt[:r]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 2.0), (None, 1.0)])
def test_forward_and_merge_are_the_definition(alpha: float | None, scale: float, transposed: bool) -> None:
    part = give(layer("lora-xs", rank=2, alpha=alpha, transposed=transposed), lora_xs_R=R)
    expected = torch.from_numpy(defined(R, scale)).float()
    torch.testing.assert_close(part(X), X @ expected.t())
    torch.testing.assert_close(part.merged(W).detach(), expected)
    a, b = part.low_rank_form()
    assert a.shape == (2, 4) and b.shape == (3, 2)
    torch.testing.assert_close(W + b @ a, expected)


def test_a_core_of_one_adds_the_largest_triplet_once_more() -> None:
    part = give(layer("lora-xs", rank=1), lora_xs_R=torch.ones(1, 1))
    torch.testing.assert_close(part.merged(W).detach() - W, FIRST, rtol=1e-5, atol=1e-6)


def test_the_core_alone_is_trained_and_zero_at_the_start() -> None:
    part = layer("lora-xs", rank=2)
    assert {name: tuple(p.shape) for name, p in part.trainables().items()} == {"lora_xs_R": (2, 2)}
    assert not part.lora_xs_R.any() and torch.equal(part(X), part.base(X))


def test_the_papers_start_is_drawn_with_its_deviation() -> None:
    found = layer("lora-xs", rank=3, options={"init": "normal"}).lora_xs_R.detach()
    assert 4e-6 < float(found.std()) < 2.5e-5 and float(found.abs().min()) > 0
    assert torch.equal(found, layer("lora-xs", rank=3, options={"init": "normal"}).lora_xs_R)


def test_the_file_keeps_the_factors_that_were_used() -> None:
    part = layer("lora-xs", rank=2)
    found = largest(W, 2, torch.Generator().manual_seed(0))
    kept = part.factor_tensors()
    for name, tensor in (("spectral_U", found.u), ("spectral_S", found.s), ("spectral_V", found.v)):
        torch.testing.assert_close(kept[name], tensor)
    other = give(layer("lora-xs", rank=2), lora_xs_R=R)
    other.set_factors(
        {name: -t if name != "spectral_S" else t for name, t in kept.items()}
    )  # both signs turned: the same
    torch.testing.assert_close(other.merged(W), give(part, lora_xs_R=R).merged(W))
