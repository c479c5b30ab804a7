"""The loss of a head whose rows come in pieces, against torch's own of the whole matrix: values, gradients, and what it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_subspace.linear_map import RowPiece
from dist_subspace.training import cross_entropy
from dist_subspace.training.cross_entropy_in_pieces import FreshLogits, Probe, cross_entropy_in_pieces
from tests.benchmarks.memory import peak_bytes
from tests.training.softmax_cases import CLASSES, CLOSE, ROWS, TYPES, WIDTH, assert_near, labels, random, torchs

# Where the rows of a piece stand in the matrix, as ranks give them: runs, a row that is none, the last piece a shorter one.
RUNS = [((0, 0, 9), (9, 25, 9)), ((0, 9, 9), (10, 34, 6)), ((1, 18, 7),)]


class InRuns:
    """A head of `(V, d)`; its rows in pieces of 19, as the runs say, and rubbish between them."""

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        self.matrix, self.bias = matrix, bias
        self.classes, self.dtype, self.given = len(matrix), matrix.dtype, 0

    def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
        self.given += 1
        for runs in RUNS:
            rows = torch.full((19, self.matrix.shape[1]), 50.0, dtype=dtype)
            for place, first, count in runs:
                rows[place : place + count] = self.matrix[first : first + count]
            yield RowPiece(rows, runs)

    def whole_bias(self) -> Tensor | None:
        return self.bias


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE", 4 * 19)


def caps(logits: Tensor) -> Tensor:
    return torch.tanh(logits * 0.3) * 2.5


def made(dtype: torch.dtype, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(ROWS, WIDTH, spread=spread).to(dtype),
        random(CLASSES, WIDTH, seed=1).to(dtype),
        random(CLASSES, seed=2).to(dtype),
    )


@pytest.mark.parametrize("each", [None, caps], ids=["plain", "capped"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 12.0])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_is_torchs_loss_with_its_gradient(
    dtype: torch.dtype, spread: float, each: Callable[[Tensor], Tensor] | None
) -> None:
    x, matrix, bias = made(dtype, spread)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    head = InRuns(matrix, bias)
    loss = cross_entropy_in_pieces(ours, None, labels(), head, each)
    plain = functional.linear(theirs, matrix, bias)
    expected = torchs(plain if each is None else each(plain), labels())
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    assert head.given == 1, "every row is asked for once"
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5 if dtype == torch.float32 else 3e-3)
    assert_near(ours.grad, theirs.grad, CLOSE[dtype])
    assert ours.grad is not None and not ours.grad[[0, 5, ROWS - 1]].any()


def test_a_label_that_is_nearly_certain_keeps_the_digits_of_its_gradient() -> None:
    """In bfloat16 p itself is 1 there, and 1 - p would be nothing."""
    matrix = random(CLASSES, WIDTH, seed=1)
    x = (12.0 * matrix / matrix.norm(dim=1, keepdim=True) ** 2)[:ROWS]
    targets = torch.arange(ROWS)
    ours, theirs = x.bfloat16().requires_grad_(), x.bfloat16().double().requires_grad_()
    cross_entropy_in_pieces(ours, None, targets, InRuns(matrix.bfloat16()), None).backward()
    functional.cross_entropy(theirs @ matrix.bfloat16().double().t(), targets, reduction="sum").backward()
    assert ours.grad is not None and theirs.grad is not None
    assert float(theirs.grad.norm(dim=1).min()) < 1e-2
    assert float(((ours.grad - theirs.grad).norm(dim=1) / theirs.grad.norm(dim=1)).max()) < 0.08


@pytest.mark.parametrize("ids", [[40, 41], [3, 30, 40]], ids=str)
@pytest.mark.parametrize("each", [None, caps], ids=["plain", "capped"])
def test_new_tokens_have_their_part(ids: list[int], each: Callable[[Tensor], Tensor] | None) -> None:
    x, matrix, _ = made(torch.float32, 1.0)
    targets = labels()
    targets[[1, 2, 3]], targets[4] = torch.tensor([ids[0], ids[-1], ids[0]]), 17
    fresh = random(ROWS, len(ids), seed=5)
    ours, own = x.clone().requires_grad_(), fresh.clone().requires_grad_()
    theirs, theirs_fresh = x.clone().requires_grad_(), fresh.clone().requires_grad_()
    loss = cross_entropy_in_pieces(ours, FreshLogits(own, torch.tensor(ids)), targets, InRuns(matrix), each)
    plain, inside = theirs @ matrix.t(), [i for i in ids if i < CLASSES]
    joined = plain.index_copy(1, torch.tensor(inside, dtype=torch.long), theirs_fresh[:, : len(inside)])
    joined = torch.cat([joined, theirs_fresh[:, len(inside) :]], 1)
    expected = torchs(joined if each is None else each(joined), targets)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_near(ours.grad, theirs.grad, 1e-5)
    assert_near(own.grad, theirs_fresh.grad, 1e-5)


def test_a_probe_has_its_logits_beside_the_loss_and_no_rows_are_a_loss_of_zero() -> None:
    x, matrix, bias = made(torch.bfloat16, 1.0)
    probe = Probe(x[:1], torch.zeros(1, CLASSES, dtype=torch.bfloat16))
    head = InRuns(matrix, bias)
    none = x[:0].clone().requires_grad_()
    loss = cross_entropy_in_pieces(none, None, torch.empty(0, dtype=torch.long), head, None, probe)
    loss.backward()
    assert head.given == 1, "other ranks wait for this one's rows"
    assert float(loss.detach()) == 0.0 and none.grad is not None and none.grad.shape == (0, WIDTH)
    torch.testing.assert_close(probe.logits, x[:1] @ matrix.t())


def test_an_evaluation_makes_no_gradients_and_a_logit_without_bound_shows() -> None:
    x, matrix, _ = made(torch.float32, 1.0)
    with torch.no_grad():
        loss = cross_entropy_in_pieces(x, None, labels(), InRuns(matrix), None)
    assert not loss.requires_grad and math.isfinite(float(loss))
    matrix[7, 0] = torch.inf
    assert not math.isfinite(float(cross_entropy_in_pieces(x, None, labels(), InRuns(matrix), None)))


def test_it_holds_a_piece_of_the_head_and_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes, width = 256, 4096, 64
    monkeypatch.setattr(cross_entropy, "PIECE", 64 * 128)
    x = random(rows, width).requires_grad_()
    targets = torch.arange(rows)

    class Made:
        """Makes its rows when they are asked for."""

        classes, dtype = 4096, torch.float32

        def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
            for first in range(0, self.classes, 128):
                yield RowPiece(random(128, width, seed=first), ((0, first, 128),))

        def whole_bias(self) -> Any:
            return None

    held = peak_bytes(lambda: cross_entropy_in_pieces(x, None, targets, Made(), None).backward())
    assert held < 8 * rows * width * 4 + 8 * 64 * 128 * 4 < classes * width * 4
