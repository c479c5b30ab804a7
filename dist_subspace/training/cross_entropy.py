"""Cross-entropy of many tokens over a large vocabulary, a piece of the tokens at a time.

A plain loss makes four matrices of tokens x vocabulary, three of them in float32. Here one piece of them exists at a time: from
logits that are there already (`summed_cross_entropy`), or from the rows that the head is given (`head_cross_entropy`), where
the whole logits never exist. Pieces are a matter of shapes alone, so that a micro-batch gives the same sums on any rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dist_subspace.torch_internals import TensorFunction
from dist_subspace.training.data.samples import IGNORED

# Tokens x vocabulary in float32 at a time: 64 MiB. A matrix product of fewer rows would wait for the head's bytes.
PIECE = 1 << 24
# Probabilities of a large vocabulary lie below what float16 tells apart; bfloat16 and float32 have the exponents for them.
GRADIENT_SCALE = {torch.float16: 256.0}


class Head(Protocol):
    """The layer that makes logits, while its weight is whole.

    classes: the size of the vocabulary; dtype: what it multiplies in, and gives; weight `(V, d)` and bias `(V,)`: where they are
    trained, else None.
    """

    @property
    def classes(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def weight(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...

    def logits(self, x: Tensor) -> Tensor:
        """`(k, V)` for `x (k, d)`, without autograd: a tensor of the caller's own."""

    def backward(self, g: Tensor) -> Tensor:
        """The gradient of x, `(k, d)`, for `g (k, V)`."""


# From the head's logits `(k, V)`, and those of new tokens `(k, m)` or None, to the model's; each row by itself.
Finish = Callable[[Tensor, Tensor | None], Tensor]


class Softmax:
    """The losses of a piece of rows, and the gradients of the logits, in one matrix of float32 that every piece writes over.

    What torch's own functions would make of the same logits, to the last digit but one: they need four such matrices.
    """

    def __init__(self) -> None:
        self._matrix = self._sums = torch.empty(0, 0)
        self._labels = torch.empty(0, dtype=torch.long)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`(k,)` float32 for `logits (k, V)` of any float type; 0 where a row is ignored. No later piece has more rows."""
        if not len(self._matrix):
            self._matrix = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        matrix, self._labels = self._matrix[: len(logits)].copy_(logits), labels.clamp(min=0)[:, None]
        matrix.sub_(matrix.amax(1, keepdim=True))
        of_labels = matrix.gather(1, self._labels)
        self._sums = matrix.exp_().sum(1, keepdim=True)
        return (self._sums.log() - of_labels)[:, 0].masked_fill(labels == IGNORED, 0.0)

    def gradient(self, factors: Tensor) -> Tensor:
        """Of the last piece's logits, `(k, V)` float32, times a factor a row, `(k,)`: to be read before the next piece."""
        factors = factors[:, None]
        gradient = self._matrix[: len(factors)].mul_(factors / self._sums)
        return gradient.scatter_add_(1, self._labels, -factors)


def pieces(rows: int, classes: int) -> Iterator[slice]:
    step = max(1, PIECE // max(1, classes))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over the rows of `logits (n, V)`, float32; `labels (n,)` on the same device, IGNORED off target."""
    return each_cross_entropy(logits, labels).sum()


def each_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """What `summed_cross_entropy` sums, of each row, `(n,)`, differentiable in the logits."""
    return _OfLogits.apply(logits, labels)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row of `logits (n, V)`, `(n,)` float32, without autograd; 0 where a row is ignored."""
    softmax, losses = Softmax(), logits.new_zeros(len(logits), dtype=torch.float32)
    for rows in pieces(*logits.shape):
        losses[rows] = softmax.losses(logits[rows], labels[rows])
    return losses


class _OfLogits(TensorFunction):
    """Keeps the logits, which the model has made anyway, and makes their gradient in their own type."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return cross_entropies(logits, labels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        softmax, gradient = Softmax(), torch.empty_like(logits)
        for rows in pieces(*logits.shape):
            softmax.losses(logits[rows], labels[rows])
            gradient[rows] = softmax.gradient(torch.where(labels[rows] == IGNORED, 0.0, g[rows]))
        return gradient, None


def head_cross_entropy(rows: Tensor, fresh: Tensor | None, labels: Tensor, head: Head, finish: Finish | None) -> Tensor:
    """The sum over the rows, float32, differentiable in the rows, in what new tokens add, and in a trained head.

    The gradients are made in the forward, while the head is whole and a piece's logits are there, and kept: `(n, d)`.

    Arguments:
        rows: `(n, d)`, what the head is given; fresh: `(n, m)`, logits of new tokens, or None.
        labels: `(n,)` on the same device.
        finish: what the model does between its head and its logits; None for nothing.
    """
    wanted = torch.is_grad_enabled()
    return _OfHead.apply(rows, fresh, head.weight, head.bias, labels, head, finish, wanted, False)


def head_cross_entropies(
    rows: Tensor, fresh: Tensor | None, labels: Tensor, head: Head, finish: Finish | None
) -> Tensor:
    """What `head_cross_entropy` sums, of each row, `(n,)` float32: differentiable in the rows and in what new tokens add, and of
    a head that is frozen, since a trained one has no gradient a row."""
    if torch.is_grad_enabled():
        if head.weight is not None or head.bias is not None:
            raise RuntimeError("the losses of single rows are asked for inside a head that is trained")
        return _OfHead.apply(rows, fresh, None, None, labels, head, finish, True, True)
    softmax, losses = Softmax(), rows.new_zeros(len(rows), dtype=torch.float32)
    for piece in pieces(len(rows), head.classes):
        made = head.logits(rows[piece].to(head.dtype))
        logits = _Logits(made, None if fresh is None else fresh[piece], finish, False)
        losses[piece] = softmax.losses(logits.finished, labels[piece])
        del logits, made  # before the next ones are made
    return losses


class _OfHead(TensorFunction):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        fresh: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        head: Head,
        finish: Finish | None,
        wanted: bool,
        apart: bool,
    ) -> Tensor:
        ctx.scale, ctx.dtype = GRADIENT_SCALE.get(head.dtype, 1.0), rows.dtype
        needed = [wanted and needs for needs in ctx.needs_input_grad]
        found = _Gradients([t if needs else None for t, needs in zip((rows, fresh, weight, bias), needed)], head)
        softmax, losses = Softmax(), rows.new_zeros(len(rows), dtype=torch.float32)
        for piece in pieces(len(rows), head.classes):
            x, y = rows[piece].to(head.dtype), labels[piece]
            logits = _Logits(head.logits(x), None if fresh is None else fresh[piece], finish, found.any)
            losses[piece] = softmax.losses(logits.finished.detach(), y)
            if found.any:
                gradient = softmax.gradient(losses.new_full((len(y),), ctx.scale).masked_fill_(y == IGNORED, 0.0))
                found.add(piece, x, logits.backward(gradient))
            del logits  # before the next ones are made
        ctx.save_for_backward(*found.tensors)
        return losses if apart else losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        rows, *others = ctx.saved_tensors
        factor = by_row(g / ctx.scale)
        grad_rows = None if rows is None else (rows * factor).to(ctx.dtype)
        return grad_rows, *(None if t is None else t * factor for t in others), None, None, None, None, None


def by_row(factor: Tensor) -> Tensor:
    """A factor a row, `(n,)`, as `(n, 1)`; one for all of them as it is."""
    return factor[:, None] if factor.dim() else factor


class _Logits:
    """The model's logits of a piece, from those of its head and of new tokens."""

    def __init__(self, logits: Tensor, fresh: Tensor | None, finish: Finish | None, wanted: bool) -> None:
        self.finished, self.leaves = logits, [logits]
        if finish is not None:
            self.leaves = [t.detach().requires_grad_(wanted) for t in (logits, fresh) if t is not None]
            with torch.set_grad_enabled(wanted):
                self.finished = finish(self.leaves[0], self.leaves[1] if fresh is not None else None)

    def backward(self, gradient: Tensor) -> list[Tensor]:
        """The gradients of the head's logits and of new tokens', in their type, which may be written over the logits."""
        if self.finished is self.leaves[0]:
            return [self.finished.copy_(gradient)]
        return list(torch.autograd.grad(self.finished, self.leaves, gradient.to(self.finished.dtype)))


class _Gradients:
    """Of the rows, of new tokens' logits, of a trained weight and its bias: those that are wanted, filled piece by piece."""

    def __init__(self, wanted: list[Tensor | None], head: Head) -> None:
        self.head, self.any = head, any(t is not None for t in wanted)
        rows, fresh, weight, bias = wanted
        self.tensors = [
            None if rows is None else torch.zeros_like(rows, dtype=head.dtype),
            None if fresh is None else torch.zeros_like(fresh),
            None if weight is None else torch.zeros_like(weight),
            None if bias is None else torch.zeros_like(bias),
        ]

    def add(self, piece: slice, x: Tensor, gradients: list[Tensor]) -> None:
        """Of a piece of rows `x`: the gradients of the head's logits, and of new tokens' where there are any."""
        rows, fresh, weight, bias = self.tensors
        g = gradients[0]
        if rows is not None:
            rows[piece] = self.head.backward(g)
        if fresh is not None:
            fresh[piece] = gradients[1]
        if weight is not None:
            weight.addmm_(g.t(), x)
        if bias is not None:
            bias.add_(g.sum(0))


def targets_of(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the targets of `labels (b, t)` are predicted, and which they are: places in the b * t positions and classes, both
    `(count,)`. A position predicts the next token, and a row's last one none.

    Arguments:
        count: how many there are. Where there are fewer, the rest stands at an ignored place.
    """
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    places = torch.nonzero_static(following != IGNORED, size=count, fill_value=following.numel() - 1)[:, 0]
    return places, following[places]
