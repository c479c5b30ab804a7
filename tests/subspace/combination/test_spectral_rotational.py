"""The rotational spectral adapter against its golden numbers."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceConfig, resolve
from dist_subspace.subspace.blocks.spectral import turned
from tests.subspace.golden import SIGMA, W, X, give, layer

P = torch.tensor([[0.0, 0.4], [0, 0]])
Q = torch.tensor([[0.0, -0.2], [0, 0]])
GOLDEN = torch.tensor([[-0.8997295444, 5.7257859683, 0.1744295307]])


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    part = give(layer("spectral-rotational", rank=2, transposed=transposed), spectral_P=P, spectral_Q=Q)
    torch.testing.assert_close(part(X), GOLDEN)


def test_the_rotations_are_the_golden_ones() -> None:
    eye = torch.eye(2)
    torch.testing.assert_close(
        eye + turned(P), torch.tensor([[0.9230769231, -0.3846153846], [0.3846153846, 0.9230769231]])
    )
    torch.testing.assert_close(
        eye + turned(Q), torch.tensor([[0.9801980198, 0.198019802], [-0.198019802, 0.9801980198]])
    )


def test_cayleys_map_gives_rotations_and_is_exactly_one_at_zero() -> None:
    r = torch.eye(7) + turned(3 * torch.randn(5, 7, 7))
    torch.testing.assert_close(r.mT @ r, torch.eye(7).expand(5, 7, 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(5))
    assert not turned(torch.zeros(7, 7)).any()
    assert turned(torch.randn(7, 7, dtype=torch.bfloat16)).dtype == torch.float32


def test_its_gradient_is_right() -> None:
    skew = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(turned, (skew,))


def test_the_singular_values_stay() -> None:
    part = give(layer("spectral-rotational", rank=2), spectral_P=torch.randn(2, 2), spectral_Q=torch.randn(2, 2))
    found = torch.linalg.svdvals(part.merged(W).detach())
    torch.testing.assert_close(found.double(), SIGMA, rtol=1e-5, atol=1e-5)
    a, b = part.low_rank_form()
    assert a.shape == (2, 4) and b.shape == (3, 2)


def test_a_gain_multiplies_the_turned_singular_values_and_files_hold_it() -> None:
    part = layer("spectral-rotational", rank=2, options={"gain": True})
    assert not part.spectral_gain.any() and torch.equal(part.file_tensors()["spectral_gain"], torch.ones(2))
    assert torch.equal(part(X), part.base(X))
    part.load_file_tensors({"spectral_P": P, "spectral_Q": Q, "spectral_gain": torch.tensor([1.5, 0.5])})
    torch.testing.assert_close(part.spectral_gain.data, torch.tensor([0.5, -0.5]))
    found = torch.linalg.svdvals(part.merged(W).detach()).double()
    torch.testing.assert_close(found, torch.stack([1.5 * SIGMA[0], SIGMA[2], 0.5 * SIGMA[1]]), rtol=1e-5, atol=1e-5)
    sizes = [p.numel() for p in part.trainables().values()]
    assert sum(sizes) == 10


def test_eight_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("spectral-rotational", rank=2).trainables().values()) == 8


def test_a_small_rotation_is_not_lost_in_16_bits() -> None:
    """R - I is computed, not R: in bfloat16 the step from 1 is 2^-8."""
    part = give(layer("spectral-rotational", rank=2), spectral_P=1e-3 * P, spectral_Q=1e-3 * Q)
    core = part.core()
    exact = layer("spectral-rotational", rank=2).double()
    give(exact, spectral_P=1e-3 * P, spectral_Q=1e-3 * Q)
    torch.testing.assert_close(core.double(), exact.core(), rtol=1e-5, atol=0)


def test_a_model_under_autocast_still_solves_in_float32() -> None:
    part = give(layer("spectral-rotational", rank=2), spectral_P=P, spectral_Q=Q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        core, y = part.core(), part(X)
    assert core.dtype == torch.float32 and torch.equal(core, part.core())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), GOLDEN, rtol=2e-2, atol=2e-2)


def test_a_single_vector_cannot_turn() -> None:
    with pytest.raises(UsageError, match=r"subspace.rank is 1, .*accepted: at least 2"):
        resolve(SubspaceConfig(method="spectral-rotational", rank=1))
