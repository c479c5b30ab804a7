"""The additive spectral adapter against its golden numbers."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.subspace import SubspaceConfig, resolve
from tests.subspace.golden import W, X, give, layer

P = torch.tensor([[0.1], [-0.2], [0.3]])
Q = torch.tensor([[0.2], [0], [-0.1], [0.1]])
GOLDEN = torch.tensor([[1.3784189197, 2.3872051041, 6.1348697228]])


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    part = give(layer("spectral-additive", rank=1, transposed=transposed), spectral_P=P, spectral_Q=Q)
    torch.testing.assert_close(part(X), GOLDEN)


def test_the_merged_matrix_is_the_papers() -> None:
    part = give(layer("spectral-additive", rank=1), spectral_P=P, spectral_Q=Q)
    u, s, v = part.spectral_U.double(), part.spectral_S.double(), part.spectral_V.double().t()
    papers = (u + P) @ torch.diag(s) @ (v + Q).t() + W.double() - u @ torch.diag(s) @ v.t()
    torch.testing.assert_close(part.merged(W).double(), papers, rtol=1e-5, atol=1e-5)
    a, b = part.low_rank_form()
    assert a.shape == (2, 4) and b.shape == (3, 2)
    torch.testing.assert_close(W + b @ a, part.merged(W).detach())


def test_alpha_does_not_scale_it() -> None:
    scaled = give(layer("spectral-additive", rank=1, alpha=7.0), spectral_P=P, spectral_Q=Q)
    torch.testing.assert_close(scaled(X), GOLDEN)
    assert resolve(SubspaceConfig(method="spectral-additive", alpha=7.0)).unused == ("alpha",)


def test_fourteen_values_are_trained_from_zero() -> None:
    trained = layer("spectral-additive", rank=2).trainables().values()
    assert sum(p.numel() for p in trained) == 14 and not any(p.any() for p in trained)


def test_the_vectors_that_were_used_are_kept() -> None:
    """Another decomposition may give other signs, with which P and Q would mean something else."""
    part = give(layer("spectral-additive", rank=1), spectral_P=P, spectral_Q=Q)
    kept = part.factor_tensors()
    flipped = {"spectral_U": -kept["spectral_U"], "spectral_S": kept["spectral_S"], "spectral_V": -kept["spectral_V"]}
    other = layer("spectral-additive", rank=1)
    other.set_factors(flipped)
    other.load_file_tensors(part.file_tensors())
    assert not torch.allclose(other(X), GOLDEN)
    other.set_factors(kept)
    torch.testing.assert_close(other(X), GOLDEN)


def test_dropout_acts_on_the_correction_alone() -> None:
    part = give(layer("spectral-additive", rank=1, dropout=0.5), spectral_P=P, spectral_Q=Q)
    torch.testing.assert_close(part.eval()(X), GOLDEN)
    part.train()
    found = {tuple((part(X) - X @ W.t()).detach().round(decimals=4)[0].tolist()) for _ in range(100)}
    update = part.merged(W).detach() - W
    allowed = set()
    for mask in range(16):
        kept = torch.tensor([[(mask >> i & 1) * 2.0 for i in range(4)]])
        allowed.add(tuple(((kept * X) @ update.t()).round(decimals=4)[0].tolist()))
    assert len(found) > 4
    assert all(min(max(abs(a - b) for a, b in zip(f, w, strict=True)) for w in allowed) < 3e-4 for f in found)
