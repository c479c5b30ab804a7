"""Gradients are summed up over the backwards of a step, in float32, until they are taken."""

from __future__ import annotations

import torch
from torch import nn

from dist_subspace.subspace.core.collect import GradientCollector
from dist_subspace.subspace.core.factors import FrozenFactor


def test_the_gradients_of_all_backwards_are_summed_in_float32() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    collector = GradientCollector({"a": parameter})
    for factor in (256.0, 1.0, 1.0):  # in bfloat16 256 + 1 is 256
        (parameter * factor).sum().backward()
        parameter.grad = None
    taken = collector.take()
    assert taken["a"].dtype == torch.float32 and taken["a"].tolist() == [258.0] * 3
    assert collector.take() == {} and collector.shapes == {"a": (3,)}
    (parameter * 2).sum().backward()
    assert collector.take()["a"].tolist() == [2.0] * 3


def test_a_pause_keeps_nothing_and_a_kept_sum_is_no_view_of_the_gradient() -> None:
    parameter = nn.Parameter(torch.ones(3))
    collector = GradientCollector({"a": parameter})
    parameter.sum().backward()
    parameter.grad.zero_()  # type: ignore[union-attr]
    collector.paused = True
    parameter.sum().backward()
    collector.paused = False
    assert collector.take()["a"].tolist() == [1.0] * 3


def test_a_frozen_factor_is_its_matrix_and_is_not_kept_for_backward() -> None:
    matrix = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    factor = FrozenFactor(matrix.t().contiguous().t())
    x = torch.randn(4, 3).requires_grad_()
    y = factor(x)
    torch.testing.assert_close(y, x @ matrix.t())
    factor.matrix.data.mul_(2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, 2 * matrix.sum(0).expand(4, 3))
    assert not factor.matrix.requires_grad and factor.matrix.is_contiguous()
    assert FrozenFactor(matrix, torch.bfloat16).matrix.dtype == torch.bfloat16
