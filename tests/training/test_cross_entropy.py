"""The loss in pieces of rows, against torch's own of all rows at once: values, gradients, and what it holds."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_subspace.training import cross_entropy
from dist_subspace.training.cross_entropy import IGNORED, head_cross_entropy, summed_cross_entropy, targets_of
from dist_subspace.training.head_kinds import Plain
from tests.benchmarks.memory import peak_bytes
from tests.training.softmax_cases import CLASSES, CLOSE, ROWS, TYPES, WIDTH, assert_near, labels, random, torchs


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows a piece, so that the last is a shorter one."""
    monkeypatch.setattr(cross_entropy, "PIECE", 4 * CLASSES)


@pytest.mark.parametrize("dtype", TYPES)
def test_of_logits_it_is_torchs_loss_and_gradient(dtype: torch.dtype) -> None:
    ours, theirs = (random(ROWS, CLASSES, spread=4).to(dtype).requires_grad_() for _ in range(2))
    loss, expected = summed_cross_entropy(ours, labels()), torchs(theirs, labels())
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_near(ours.grad, theirs.grad, CLOSE[dtype])
    assert ours.grad is not None and not ours.grad[[0, 5, ROWS - 1]].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_of_a_head_it_is_torchs_loss_and_the_gradients_of_rows_weight_and_bias(dtype: torch.dtype, bias: bool) -> None:
    shapes = [(ROWS, WIDTH), (CLASSES, WIDTH), *([(CLASSES,)] if bias else [])]
    ours, theirs = ([random(*s, seed=n).to(dtype).requires_grad_() for n, s in enumerate(shapes)] for _ in range(2))
    x, weight, shift = (*ours, None)[:3]
    assert x is not None and weight is not None
    loss = head_cross_entropy(x, None, labels(), Plain(weight, shift, weight, shift), None)
    expected = torchs(functional.linear(*theirs), labels())
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one.grad, other.grad, CLOSE[dtype])


def test_what_the_model_does_behind_its_head_and_what_new_tokens_add_have_their_gradients() -> None:
    ours, theirs = ([random(ROWS, WIDTH).requires_grad_(), random(ROWS, 3, seed=2).requires_grad_()] for _ in range(2))
    weight = random(CLASSES, WIDTH, seed=1)

    def finish(logits: Tensor, fresh: Tensor | None) -> Tensor:
        assert fresh is not None
        return 2.0 * torch.tanh(torch.cat([logits, fresh], -1) / 2.0)

    loss = head_cross_entropy(ours[0], ours[1], labels(), Plain(weight, None), finish)
    expected = torchs(finish(theirs[0] @ weight.t(), theirs[1]), labels())
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one.grad, other.grad, 1e-5)


def test_a_frozen_head_gets_no_gradient_and_without_autograd_nothing_is_made_for_one() -> None:
    x, weight = random(ROWS, WIDTH).requires_grad_(), random(CLASSES, WIDTH, seed=1)
    head_cross_entropy(x, None, labels(), Plain(weight, None), None).backward()
    assert x.grad is not None and weight.grad is None

    class OnlyForward(Plain):
        def backward(self, g: Tensor) -> Tensor:
            raise AssertionError("a gradient is made that nobody asked for")

    with torch.no_grad():
        assert not head_cross_entropy(x, None, labels(), OnlyForward(weight, None), None).requires_grad
    detached = head_cross_entropy(x.detach(), None, labels(), OnlyForward(weight, None), None)
    assert not detached.requires_grad


def test_no_target_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    x, weight = random(ROWS, WIDTH).requires_grad_(), random(CLASSES, WIDTH, seed=1)
    nothing = torch.zeros(0, dtype=torch.long)
    loss = head_cross_entropy(x[nothing], None, nothing, Plain(weight, None), None)
    loss.backward()
    assert float(loss.detach()) == 0.0 and x.grad is not None and not x.grad.any()


def test_an_impossible_target_is_an_infinite_loss_with_the_gradient_that_torch_gives() -> None:
    ours, theirs = (random(ROWS, CLASSES).requires_grad_() for _ in range(2))
    shut = torch.zeros(CLASSES).index_fill(0, labels()[1:2], -math.inf)
    loss = summed_cross_entropy(ours + shut, labels())
    loss.backward()
    torchs(theirs + shut, labels()).backward()
    assert float(loss.detach()) == math.inf
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_in_16_bits_what_many_unlikely_tokens_add_up_to_is_not_lost() -> None:
    """Probabilities of 2e-8: float16 has no number that small."""
    classes, weight = 5000, torch.full((5000, 1), 8.0, dtype=torch.float16)
    weight[0] = 25.5
    x = torch.ones(1, 1, dtype=torch.float16).requires_grad_()
    head_cross_entropy(x, None, torch.tensor([0]), Plain(weight, None), None).backward()
    p = torch.softmax(weight.double()[:, 0], 0)
    expected = float(((p - (torch.arange(classes) == 0).double()) * weight.double()[:, 0]).sum())
    assert x.grad is not None and float(x.grad) == pytest.approx(expected, rel=2e-2)


def test_the_parts_of_a_loss_that_is_used_twice_are_not_scaled_twice() -> None:
    x, weight = random(ROWS, WIDTH).requires_grad_(), random(CLASSES, WIDTH, seed=1).requires_grad_()
    loss = head_cross_entropy(x, None, labels(), Plain(weight, None, weight, None), None)
    once = torch.autograd.grad(loss * 0.5, [x, weight], retain_graph=True)
    again = torch.autograd.grad(loss * 0.5, [x, weight])
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", ["head", "logits"])
def test_tokens_times_vocabulary_are_never_held_in_float32(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes = 64, 8192
    monkeypatch.setattr(cross_entropy, "PIECE", 4 * classes)
    whole, piece = 2 * rows * classes, 4 * 4 * classes
    targets = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(0))
    if way == "logits":
        logits = random(rows, classes).to(torch.bfloat16).requires_grad_()
        # The logits and their gradient in their own type, and a piece in float32.
        step = partial(torch.autograd.grad, summed_cross_entropy(logits, targets), logits)
        assert peak_bytes(step) < 2 * whole + 3 * piece
    else:
        x = random(rows, WIDTH).to(torch.bfloat16).requires_grad_()
        head = Plain(random(classes, WIDTH, seed=1).to(torch.bfloat16), None)
        assert peak_bytes(lambda: head_cross_entropy(x, None, targets, head, None).backward()) < 3 * piece


def test_a_position_predicts_the_next_token_and_the_last_of_a_row_none() -> None:
    given = torch.tensor([[IGNORED, 5, 6, IGNORED, 7], [IGNORED, IGNORED, 8, IGNORED, IGNORED]])
    places, classes = targets_of(given, 4)
    assert places.tolist() == [0, 1, 3, 6] and classes.tolist() == [5, 6, 7, 8]
    places, classes = targets_of(given, 5)
    assert classes.tolist() == [5, 6, 7, 8, IGNORED] and int(places[-1]) == 9
