"""SVDiff against its golden numbers, its clamp and its strength."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, resolve
from tests.subspace.golden import G, X, give, layer, settled

SHIFTS = torch.tensor([0.5, -10, 0.25])


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    part = give(layer("svdiff", transposed=transposed), svdiff_delta=SHIFTS)
    torch.testing.assert_close(part(X), torch.tensor([[0.7861629185, -0.3452102583, 0.4612192277]]))
    found = torch.linalg.svdvals(part.merged(part.base.dense()).detach())
    torch.testing.assert_close(found, torch.tensor([5.7907835312, 2.0449813446, 0]), rtol=1e-5, atol=1e-5)


def test_a_direction_below_zero_has_no_gradient() -> None:
    part = give(layer("svdiff"), svdiff_delta=SHIFTS)
    part(X).backward(G)
    assert part.svdiff_delta.grad[1] == 0 and part.svdiff_delta.grad[[0, 2]].all()


def test_strength_zero_is_the_identity_and_another_scales_the_shifts() -> None:
    off = give(layer("svdiff", options={"strength": 0}), svdiff_delta=SHIFTS)
    assert torch.equal(off(X), off.base(X))
    half = give(layer("svdiff", options={"strength": 0.5}), svdiff_delta=2 * SHIFTS)
    torch.testing.assert_close(half(X), give(layer("svdiff"), svdiff_delta=SHIFTS)(X))


def test_a_singular_value_of_zero_may_still_grow() -> None:
    """At the bound, where max(cδ, -σ) has two gradients, the one that lets it train is taken."""
    resolved = resolve(SubspaceConfig(method="svdiff"))
    part = settled(resolved.method.build(pack(torch.zeros(3, 4), "fp32"), resolved.settings, torch.Generator(), None))
    x = torch.randn(5, 4)
    y = part(x)
    assert not y.any()
    y.backward(torch.randn(5, 3))
    assert part.svdiff_delta.grad.all()


def test_three_values_are_trained_and_files_hold_the_shifts() -> None:
    part = give(layer("svdiff"), svdiff_delta=SHIFTS)
    assert sum(p.numel() for p in part.trainables().values()) == 3
    assert torch.equal(part.file_tensors()["svdiff_delta"], SHIFTS)
