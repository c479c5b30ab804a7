"""Dropout whose mask is drawn again: the same mask in backward, by the seed alone, and nothing kept."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.subspace.blocks.dropout import Dropout, drop

X = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) + 3


def test_entries_are_dropped_at_the_rate_and_the_others_scaled() -> None:
    found = drop(X, 0.25)
    kept = found != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(found[kept], X[kept] / 0.75)


def test_backward_has_the_mask_of_forward_and_keeps_no_tensor() -> None:
    x, saved = X.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = drop(x, 0.5)
    torch.randn(7)  # what others draw meanwhile
    y.backward(torch.ones_like(y))
    assert saved == [] and torch.equal(x.grad, (y != 0).float() * 2)


def test_one_dropout_has_one_mask_and_another_one_another() -> None:
    first, second = Dropout(0.5, X), Dropout(0.5, X)
    assert torch.equal(first(X), first(X)) and torch.equal(first(X), first.again()(X))
    assert not torch.equal(first(X), second(X))


def test_the_seed_comes_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first = drop(X, 0.5)
    torch.manual_seed(3)
    assert torch.equal(drop(X, 0.5), first)


def test_at_rate_zero_nothing_is_drawn() -> None:
    state = torch.random.get_rng_state()
    assert drop(X, 0.0) is X and Dropout(0.0, X)(X) is X
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_mask_has_the_type_of_the_input() -> None:
    assert drop(X.to(torch.bfloat16), 0.5).dtype == torch.bfloat16
