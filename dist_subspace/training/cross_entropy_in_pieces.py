"""Cross-entropy with a head whose rows come a few at a time: every row is used once, for all tokens, and let go.

A softmax over all classes is not known before the last piece. So each token keeps what is known so far: its largest logit, the
sum of the exponentials under it, and the sum of the head's rows that these weigh, which a larger logit scales down (as in flash
attention). The label stands apart from the other classes, `1 - p` being the others' share: nothing cancels where p is near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_subspace.linear_map import RowPiece, product_type
from dist_subspace.torch_internals import TensorFunction
from dist_subspace.training.cross_entropy import GRADIENT_SCALE, by_row, pieces
from dist_subspace.training.data.samples import IGNORED

# What the model does with each of its logits by itself.
EachLogit = Callable[[Tensor], Tensor]


class PieceHead(Protocol):
    """A frozen head that gives its rows: `classes` of them, logits in `dtype`."""

    @property
    def classes(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
        """Every row once, in the given type; collective where they come from several ranks."""

    def whole_bias(self) -> Tensor | None:
        """`(V,)`; collective where it is split."""


@dataclass(frozen=True)
class FreshLogits:
    """Logits of new tokens, `(n, m)`, and their classes, `(m,)` on the CPU: within the head's, which they replace, or above."""

    logits: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Probe:
    """A row `(1, d)` beside the others, whose product with the head, without bias, is written to `logits (1, V)`."""

    row: Tensor
    logits: Tensor


def cross_entropy_in_pieces(
    rows: Tensor,
    fresh: FreshLogits | None,
    labels: Tensor,
    head: PieceHead,
    each: EachLogit | None,
    probe: Probe | None = None,
) -> Tensor:
    """Collective where the head's rows come from several ranks: the sum over the rows, float32, differentiable in the rows and in
    the logits of new tokens. The gradients are made in the forward and kept.

    Arguments:
        rows: `(n, d)`, what the head is given; n may be 0.
        labels: `(n,)` on the CPU.
        each: what the model does with the logits; None for nothing.
    """
    own, task = _task(fresh, labels, head, each, probe)
    return _InPieces.apply(rows, own, task, torch.is_grad_enabled(), False)


def cross_entropies_in_pieces(
    rows: Tensor,
    fresh: FreshLogits | None,
    labels: Tensor,
    head: PieceHead,
    each: EachLogit | None,
    probe: Probe | None = None,
) -> Tensor:
    """Collective as it is: what `cross_entropy_in_pieces` sums, of each row, `(n,)` float32, differentiable in the same."""
    own, task = _task(fresh, labels, head, each, probe)
    if torch.is_grad_enabled():
        return _InPieces.apply(rows, own, task, True, True)
    return _summed(rows, own, task, False).losses()


@dataclass(frozen=True)
class _Task:
    head: PieceHead
    labels: Tensor
    ids: Tensor
    each: EachLogit | None
    probe: Probe | None


def _task(
    fresh: FreshLogits | None, labels: Tensor, head: PieceHead, each: EachLogit | None, probe: Probe | None
) -> tuple[Tensor | None, _Task]:
    ids = torch.empty(0, dtype=torch.long) if fresh is None else fresh.ids
    return None if fresh is None else fresh.logits, _Task(head, labels, ids, each, probe)


def _summed(rows: Tensor, fresh: Tensor | None, task: _Task, wanted: bool) -> _Sums:
    """Collective where the head's rows come from several ranks: what is known once every piece has come."""
    sums = _Sums(rows, task, wanted)
    bias = task.head.whole_bias()
    for piece in task.head.row_pieces(sums.wide):
        sums.add_piece(piece, bias)
    if fresh is not None:
        sums.add_fresh(fresh)
    return sums


class _InPieces(TensorFunction):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, fresh: Tensor | None, task: _Task, wanted: bool, apart: bool) -> Tensor:
        needed = [wanted and needs for needs in ctx.needs_input_grad[:2]]
        sums = _summed(rows, fresh, task, any(needed))
        losses = sums.losses()
        ctx.scale, ctx.dtype = sums.scale, rows.dtype
        ctx.save_for_backward(
            sums.gradient() if needed[0] else None, sums.fresh_gradient() if needed[1] and fresh is not None else None
        )
        return losses if apart else losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        rows, fresh = ctx.saved_tensors
        factor = by_row(g / ctx.scale)
        grad_rows = None if rows is None else (rows * factor).to(ctx.dtype)
        return grad_rows, None if fresh is None else fresh * factor, None, None, None


class _Sums:
    """What is known of every row's softmax so far.

    largest, others: of the classes that are no label, the largest logit and the sum of exponentials under it; pull: the head's
    rows, weighed by these exponentials. label: the label's logit; slope: what the model does to it, differentiated; push: the
    label's row of the head.
    """

    def __init__(self, rows: Tensor, task: _Task, wanted: bool) -> None:
        self.rows, self.task, self.wanted = rows, task, wanted
        self.dtype, self.wide = task.head.dtype, product_type(rows.new_empty(0, dtype=task.head.dtype))
        self.scale = GRADIENT_SCALE.get(self.dtype, 1.0)
        self.largest = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
        self.others, self.label = torch.zeros_like(self.largest), torch.zeros_like(self.largest)
        self.slope = torch.ones_like(self.largest)
        if wanted:
            self.pull = rows.new_zeros(rows.shape, dtype=torch.float32)
            self.push = rows.new_zeros(rows.shape, dtype=self.dtype)

    def add_piece(self, piece: RowPiece, bias: Tensor | None) -> None:
        classes = torch.full((len(piece.rows),), -1)
        for place, first, count in piece.runs:
            classes[place : place + count] = torch.arange(first, first + count)
        left_out = (classes < 0) | torch.isin(classes, self.task.ids)
        columns = torch.full((self.task.head.classes,), -1)  # of each class in this piece
        columns[classes[~left_out]] = torch.nonzero(~left_out)[:, 0]
        device = self.rows.device
        shift = None if bias is None else bias.index_select(0, classes.clamp(min=0).to(device)).to(self.dtype)
        masked = left_out.to(device) if bool(left_out.any()) else None
        for part in pieces(len(self.rows), len(piece.rows)):
            raw = self._logits(self.rows[part].to(self.dtype), piece, shift)
            self._add(part, raw, columns, masked, piece.rows)
        if self.task.probe is not None:
            raw = self._logits(self.task.probe.row.to(self.dtype), piece, None)
            for place, first, count in piece.runs:
                self.task.probe.logits[:, first : first + count] = raw[:, place : place + count]

    def add_fresh(self, fresh: Tensor) -> None:
        columns = torch.full((max(self.task.head.classes, int(self.task.ids.max()) + 1),), -1)
        columns[self.task.ids] = torch.arange(len(self.task.ids))
        self.fresh, self.fresh_columns = fresh, columns
        self._add(slice(0, len(self.rows)), fresh.to(self.dtype), columns, None, None)

    def _logits(self, x: Tensor, piece: RowPiece, shift: Tensor | None) -> Tensor:
        raw = (x.to(self.wide) @ piece.rows.t()).to(self.dtype)
        return raw if shift is None else raw.add_(shift)

    def _labels(self, part: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the rows have their label among the columns, and at which."""
        own = self.task.labels[part]
        found = torch.where(own == IGNORED, -1, columns[own.clamp(0, len(columns) - 1)])
        found = torch.where(own < len(columns), found, -1)
        at = torch.nonzero(found >= 0)[:, 0]
        return at.to(self.rows.device), found[at].to(self.rows.device)

    def _add(self, part: slice, raw: Tensor, columns: Tensor, masked: Tensor | None, matrix: Tensor | None) -> None:
        """Logits of the rows `part` for some classes, whose rows of the head `matrix` holds (None: new tokens')."""
        at, column = self._labels(part, columns)
        leaf, finished = self._finished(raw, self.wanted and matrix is not None)
        logits = finished.detach().to(torch.float32, copy=True)
        self.label[part].index_copy_(0, at, logits[at, column])
        logits[at, column] = -torch.inf
        if masked is not None:
            logits.masked_fill_(masked, -torch.inf)
        top = logits.amax(1)
        logits.sub_(_finite(top)[:, None]).exp_()
        total = logits.sum(1)
        before = self.largest[part].clone()
        largest = torch.maximum(before, top)
        kept, new = (before - _finite(largest)).exp(), (top - _finite(largest)).exp()
        self.largest[part] = largest
        self.others[part] = self.others[part] * kept + total * new
        if not self.wanted:
            return
        if self.task.each is not None:
            self.slope[part].index_copy_(0, at, self._slope(raw[at, column]))
        if matrix is None:
            self.pull[part] *= kept[:, None]
            return
        self.push[part].index_copy_(0, at, matrix.index_select(0, column).to(self.dtype))
        gradient = logits.mul_((self.scale / total.clamp(min=torch.finfo(torch.float32).tiny))[:, None])
        if leaf is None:
            gradient = gradient.to(self.dtype)
        else:
            (gradient,) = torch.autograd.grad(finished, leaf, gradient.to(finished.dtype))
        part_of_it = gradient.to(self.wide) @ matrix
        self.pull[part].mul_(kept[:, None]).addcmul_(part_of_it.float(), (total * new / self.scale)[:, None])

    def _finished(self, raw: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
        if self.task.each is None:
            return None, raw
        leaf = raw.detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            return leaf, self.task.each(leaf)

    def _slope(self, raw: Tensor) -> Tensor:
        leaf, finished = self._finished(raw[:, None].float(), True)
        assert leaf is not None  # asked for where there is something to be done
        (slope,) = torch.autograd.grad(finished, leaf, torch.ones_like(finished))
        return slope[:, 0].float()

    def losses(self) -> Tensor:
        """`(n,)`; from here on no piece comes."""
        top = torch.maximum(self.largest, self.label)
        self.kept = (self.largest - top).exp()
        self.others *= self.kept
        self.total = self.others + (self.label - top).exp()
        self.top = top
        self.ignored = (self.task.labels == IGNORED).to(self.rows.device)
        return (top - self.label + self.total.log()).masked_fill(self.ignored, 0.0)

    def gradient(self) -> Tensor:
        """Of the rows, `(n, d)`, times the scale."""
        pull = (self.scale * self.kept / self.total).masked_fill(self.ignored, 0.0)[:, None]
        push = (self.scale * self.slope * self.others / self.total).masked_fill(self.ignored, 0.0)[:, None]
        return self.pull.mul_(pull).sub_(self.push * push).to(self.dtype)

    def fresh_gradient(self) -> Tensor:
        """Of the new tokens' logits, `(n, m)`, times the scale."""
        at, column = self._labels(slice(0, len(self.rows)), self.fresh_columns)
        leaf, finished = self._finished(self.fresh.detach().to(self.dtype), True)
        gradient = (finished.detach().float() - self.top[:, None]).exp_().div_(self.total[:, None])
        gradient[at, column] = -(self.others / self.total)[at]
        gradient.mul_(self.scale).masked_fill_(self.ignored[:, None], 0.0)
        if leaf is not None:
            (gradient,) = torch.autograd.grad(finished, leaf, gradient.to(finished.dtype))
        return gradient.to(self.fresh.dtype)


def _finite(values: Tensor) -> Tensor:
    """Zero for minus infinity: where no class has come yet, there is nothing to be subtracted from."""
    return values.masked_fill(values == -torch.inf, 0.0)
