"""The update measured from a frozen pair: its formula, its gradients, zero at the start in every type, nothing frozen kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_subspace.subspace.blocks.deviation import DeviationUpdate, FrozenPair, PinnedUpdate

DOUBLE = torch.float64


class Pair(nn.Module):
    """A frozen pair with weights, as a part holds it."""

    def __init__(self, weights: Tensor | float, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 5, dtype=dtype), requires_grad=False)
        self.b = nn.Parameter(torch.randn(4, 2, dtype=dtype), requires_grad=False)
        self.weights = weights

    def frozen_pair(self) -> FrozenPair:
        return self.a, self.b, self.weights


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((3, 2, 4), (3, 2, 5), (2, 5), (4, 2))
    return tuple(torch.randn(shape, dtype=DOUBLE, requires_grad=True) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("weights", [1.0, 0.7, torch.tensor([2.0, -0.5], dtype=DOUBLE)], ids=["one", "scale", "each"])
@pytest.mark.parametrize("absolute", [True, False])
def test_it_is_the_difference_of_the_two_products(weights: Tensor | float, absolute: bool) -> None:
    pair, (z, x, a, b) = Pair(weights), inputs()
    diagonal = torch.diag(weights) if isinstance(weights, Tensor) else weights * torch.eye(2, dtype=DOUBLE)
    a1, b1 = (a, b) if absolute else (pair.a + a, pair.b + b)
    expected = z + x @ (b1 @ diagonal @ a1 - pair.b @ diagonal @ pair.a).t()
    torch.testing.assert_close(DeviationUpdate.apply(z, x, a, b, pair, absolute, 0.0), expected)
    assert torch.autograd.gradcheck(lambda *t: DeviationUpdate.apply(*t, pair, absolute, 0.0), (z, x, a, b))


def test_the_frozen_product_alone() -> None:
    pair, (z, x, _, _) = Pair(0.7), inputs()
    expected = z - 2 * 0.7 * x @ pair.a.t() @ pair.b.t()
    torch.testing.assert_close(PinnedUpdate.apply(z, x, pair.frozen_pair, -2.0), expected)
    assert torch.autograd.gradcheck(lambda *t: PinnedUpdate.apply(*t, pair.frozen_pair, -2.0), (z, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_the_start_nothing_is_added_to_the_last_bit(dtype: torch.dtype) -> None:
    pair = Pair(1.3, dtype)
    z, x = 100 * torch.randn(6, 4, dtype=dtype), 100 * torch.randn(6, 5, dtype=dtype)
    assert torch.equal(DeviationUpdate.apply(z, x, pair.a.float(), pair.b.float(), pair, True, 0.0), z)


def test_a_small_change_of_a_large_pair_survives_16_bits() -> None:
    """Two branches of size 100 in bfloat16 would differ by rounding alone; the change is of size 0.1."""
    pair = Pair(1.0, torch.bfloat16)
    a, b = 10 * pair.a.float(), 10 * pair.b.float()
    pair.a.data, pair.b.data = a.bfloat16(), b.bfloat16()
    a0, b0 = pair.a.float(), pair.b.float()
    a1, b1 = a0 + 1e-3 * torch.randn(2, 5), b0 + 1e-3 * torch.randn(4, 2)
    x = torch.randn(50, 5)
    wanted = x.bfloat16().float() @ (b1 @ a1 - b0 @ a0).t()
    x = x.bfloat16()
    found = DeviationUpdate.apply(torch.zeros(50, 4, dtype=torch.bfloat16), x, a1, b1, pair, True, 0.0).float()
    naive = ((x @ a1.t().bfloat16()) @ b1.t().bfloat16() - (x @ pair.a.t()) @ pair.b.t()).float()
    assert (found - wanted).norm() < 0.02 * wanted.norm() < 0.1 * (naive - wanted).norm()


def test_backward_reads_the_frozen_pair_again_and_keeps_none_of_it() -> None:
    pair, (z, x, a, b) = Pair(0.7), inputs()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = DeviationUpdate.apply(z, x, a, b, pair, True, 0.0)
    assert not {pair.a.data_ptr(), pair.b.data_ptr()} & set(kept)
    wholes = pair.a.data, pair.b.data
    pair.a.data, pair.b.data = (
        torch.empty(0, dtype=DOUBLE),
        torch.empty(0, dtype=DOUBLE),
    )  # as a sharding engine lets go
    pair.a.data, pair.b.data = (t.clone() for t in wholes)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, x, g)[0]
    torch.testing.assert_close(found, g @ (0.7 * (b @ a - pair.b @ pair.a)))


def test_dropout_acts_on_the_whole_difference_with_one_mask() -> None:
    pair, (_, _, a, b) = Pair(0.7), inputs()
    x = torch.randn(7, 5, dtype=DOUBLE, requires_grad=True)
    torch.manual_seed(3)
    y = DeviationUpdate.apply(torch.zeros(7, 4, dtype=DOUBLE), x, a, b, pair, True, 0.5)
    rows = torch.stack([torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(4)], -1)
    torch.testing.assert_close((rows * x[..., None]).sum(1), y)  # linear in x for the mask that was drawn
    assert not torch.allclose(rows, (0.7 * (b @ a - pair.b @ pair.a)).t().expand(7, 5, 4))
