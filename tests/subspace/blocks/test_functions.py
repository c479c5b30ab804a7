"""The autograd functions that methods are made of: what they compute, their gradients in every input, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace.subspace.blocks.directions import DirectedUpdate
from dist_subspace.subspace.blocks.dropout import Dropout
from dist_subspace.subspace.blocks.magnitude import ScaledUpdate, Stack
from dist_subspace.subspace.blocks.projections import Projections
from dist_subspace.subspace.blocks.scaling import Scale
from dist_subspace.subspace.blocks.spectral import Diagonal, turned

D_IN, D_OUT, R, Q, SCALE = 4, 3, 2, 2, 1.5
W = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
U = torch.randn(D_OUT, Q, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
V = torch.randn(Q, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def projections() -> Projections:
    """Larger than the layer in both directions: a layer has the first columns and rows."""
    generator = torch.Generator().manual_seed(6)
    a = torch.randn(R, D_IN + 3, dtype=torch.float64, generator=generator)
    return Projections(a, torch.randn(D_OUT + 2, R, dtype=torch.float64, generator=generator))


FROZEN = projections()


def scaled(x: Tensor, a: Tensor, b: Tensor, delta: Tensor) -> Tensor:
    off = Dropout(0.0, x)
    stack = Stack.apply(x, a, off, True)
    return ScaledUpdate.apply(stack @ W.t(), x, a, b, delta, SCALE, off)  # type: ignore[no-any-return]


def rescaled(x: Tensor, a: Tensor, b: Tensor, delta: Tensor) -> Tensor:
    return (1 + delta) * (x @ (W + SCALE * b @ a).t())


def between(x: Tensor, d: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    a, b = FROZEN.a[:, :D_IN], FROZEN.b[:D_OUT]
    return l * (d * (x @ a.t()) @ b.t())


# what it is -> the function, the formula, the shapes of its inputs behind x
FUNCTIONS: dict[str, tuple[Any, Any, list[tuple[int, ...]]]] = {
    "scale": (Scale.apply, lambda x, delta: (1 + delta) * x, [(D_IN,)]),
    "diagonal": (Diagonal.apply, lambda x, delta: delta * x, [(D_IN,)]),
    "directed": (
        lambda x, z, a, b, delta: DirectedUpdate.apply(z, x, a, b, delta, U, V, SCALE, 0.0),
        lambda x, z, a, b, delta: z + SCALE * x @ a.t() @ b.t() + (delta * (x @ V.t())) @ U.t(),
        [(2, 3, D_OUT), (R, D_IN), (D_OUT, R), (Q,)],
    ),
    "scaled": (scaled, rescaled, [(R, D_IN), (D_OUT, R), (D_OUT,)]),
    "between": (
        lambda x, z, d, l: FROZEN(z, x, d, l, 0.0),  # noqa: E741
        lambda x, z, d, l: z + between(x, d, l),  # noqa: E741
        [(2, 3, D_OUT), (R,), (D_OUT,)],
    ),
}


def inputs(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in [(2, 3, D_IN), *shapes]]
    return [tensor.requires_grad_() for tensor in drawn]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_formula(name: str) -> None:
    function, formula, shapes = FUNCTIONS[name]
    given = inputs(shapes)
    found, expected = function(*given), formula(*given)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = torch.autograd.grad(found, given, upstream), torch.autograd.grad(expected, given, upstream)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)  # sums over tokens are float32


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_input_that_needs_no_gradient_gets_none(name: str) -> None:
    function, _, shapes = FUNCTIONS[name]
    given = inputs(shapes)
    given[0].requires_grad_(False)
    function(*given).sum().backward()
    assert given[0].grad is None and all(tensor.grad is not None for tensor in given[1:])


@pytest.mark.parametrize("name", ["directed", "between"])
def test_under_dropout_the_update_alone_sees_the_mask(name: str) -> None:
    _, formula, shapes = FUNCTIONS[name]
    given = inputs(shapes)
    x, z, *rest = given
    torch.manual_seed(0)
    masked = Dropout(0.5, x.reshape(-1, D_IN))(x.detach().reshape(-1, D_IN)).view_as(x).requires_grad_()
    torch.manual_seed(0)
    if name == "directed":
        found = DirectedUpdate.apply(z, x, *rest, U, V, SCALE, 0.5)
    else:
        found = FROZEN(z, x, *rest, 0.5)
    torch.testing.assert_close(found, formula(masked, z, *rest))
    upstream = torch.ones_like(found)
    (ours,) = torch.autograd.grad(found, x, upstream)
    (theirs,) = torch.autograd.grad(formula(masked, z, *rest), masked, upstream)
    torch.testing.assert_close(ours, theirs * (masked != 0) * 2)


def test_a_scale_near_one_keeps_what_a_small_step_adds_in_16_bits() -> None:
    x, delta = torch.full((1, 2), 256.0, dtype=torch.bfloat16), torch.full((2,), 2.0**-7)
    assert Scale.apply(x, delta).tolist() == [[258.0, 258.0]]


def test_a_rotation_is_one_and_begins_at_none() -> None:
    skew = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(4))
    rotation = turned(skew) + torch.eye(5)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(5).expand(2, 5, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(2))
    assert not turned(torch.zeros(3, 3)).any()
    symmetric = skew + skew.mT
    assert turned(symmetric).abs().max() < 1e-6  # only what is skew turns
    assert turned(torch.zeros(3, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_one_layer_answers_for_the_shared_projections() -> None:
    shared = projections()
    assert [shared.claim() for _ in range(3)] == [True, False, False]
    assert not shared.a.requires_grad and not shared.b.requires_grad
