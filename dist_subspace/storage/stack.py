"""The matrices of a mixture's experts, frozen, as one operator: a stack that is held expert by expert.

Each expert is packed as a linear layer of its own, by the storage's own `pack`, so that a storage knows nothing of stacks. The
tensors of the experts lie one behind the other in one parameter each, so that a sharding engine gathers a layer's stack at
once, by one call of one module, whichever experts a rank's tokens go to. Products are made for those experts alone that were
given tokens: expert by expert, one matrix decoded at a time, or, where the device has a kernel for it, of a few experts at once
(grouped.py). As in operator.py, nothing of the weights is saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.linear_map import Gate, through, through_gate
from dist_subspace.module_places import with_tensors
from dist_subspace.storage.dense import DenseLinear
from dist_subspace.storage.grouped import AT_ONCE, grouped_products, in_groups, is_aligned, multiply
from dist_subspace.storage.operator import FrozenLinear, Origin, frozen
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.registry import pack, storage_info


class FrozenStack(nn.Module):
    """`y = W_e x` for the tokens x of each expert e, the `W_e` frozen and of logical shape `(d_out, d_in)`.

    Arguments:
        one: an expert's operator, which says how its tensors become a matrix; its own tensors are not kept.
        tensors: the operator's tensors of all experts, `(experts, ...)` each.
        plain: each expert's `plain_values`.
        transposed: whether the model and its checkpoint hold `(experts, d_in, d_out)`.
        origin: where the whole stack came from, if it was read from a file.

    at_once: how many matrices are decoded at once, at most.
    """

    at_once: int = AT_ONCE

    def __init__(
        self,
        one: FrozenLinear,
        tensors: Mapping[str, Tensor],
        plain: Sequence[Mapping[str, float]],
        *,
        transposed: bool,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.transposed, self.origin, self.plain = transposed, origin, tuple(plain)
        self.kind = (with_tensors(one, {}),)  # in a tuple, because an attribute that is a module would be a part
        for name, tensor in tensors.items():
            self.register_parameter(name, frozen(tensor))

    @property
    def experts(self) -> int:
        return len(self.plain)

    @property
    def expert_shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return self.kind[0].shape

    @property
    def storage(self) -> str:
        return self.kind[0].storage

    @property
    def is_float(self) -> bool:
        return self.kind[0].is_float

    def options(self) -> dict[str, Any]:
        """The storage's options with which the experts are held (`model.storage_options`)."""
        return self.kind[0].options()

    def weights_in(self, name: str) -> int:
        """How many numbers the parameter called `name` stands for, as `FrozenLinear.weights_in`."""
        return self.experts * self.kind[0].weights_in(name)

    def expert(self, number: int) -> FrozenLinear:
        """The operator of one expert on views of the parameters as they are now: not to be kept where these may be split."""
        views = {name: parameter[number] for name, parameter in self.named_parameters(recurse=False)}
        operator = with_tensors(self.kind[0], {**views, "bias": None})
        operator.set_plain_values(self.plain[number])
        return operator

    def plain_values(self) -> tuple[Mapping[str, float], ...]:
        """Each expert's."""
        return self.plain

    def set_plain_values(self, values: Sequence[Mapping[str, float]]) -> None:
        """The inverse of `plain_values`."""
        self.plain = tuple(values)

    def repacked(self, matrices: Iterable[Tensor]) -> FrozenStack:
        """Other matrices `(d_out, d_in)`, one for each expert, in this stack's storage and layout: a new stack. One at a time is
        asked for and packed; the parameters of this one are whole."""
        tensors = {name: torch.empty_like(parameter) for name, parameter in self.named_parameters(recurse=False)}
        plain = []
        for number, matrix in enumerate(matrices):
            packed = self.expert(number).repacked(matrix)
            for name, tensor in tensors.items():
                tensor[number] = packed.get_parameter(name)
            plain.append(packed.plain_values())
        return FrozenStack(self.kind[0], tensors, plain, transposed=self.transposed, origin=self.origin)

    def operator(self, number: int) -> ExpertOperator:
        """The same as an operator that reads the parameters anew whenever it is called: what a method is put on."""
        return ExpertOperator(self, number)

    def forward(
        self, x: Tensor, counts: Sequence[int], each: Callable[[ExpertOperator, Tensor], Tensor] | None = None
    ) -> Tensor:
        """`(rows, d_out)` for `x (rows, d_in)`, which holds the first expert's tokens, then the second's, and so on.

        Arguments:
            counts: how many tokens each expert has. Rows beyond their sum are zeros.
            each: what is computed with an expert's operator and tokens, where that is more than the product.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if each is None:
            return through(_Routed(self, counts), x)
        beyond = x.shape[0] - sum(counts)
        # One backward for all slices of x, and not one of its whole size for each.
        pieces = x.split([*(count for count in counts if count), beyond])
        together = _Together(self, counts, x, pieces) if in_groups(x) else None
        numbers = (number for number, _ in hit(counts))
        made = [each(ExpertOperator(self, n, together), rows) for n, rows in zip(numbers, pieces, strict=False)]
        return torch.cat([*made, x.new_zeros(beyond, self.expert_shape[0])])

    def matrices(self, dtype: torch.dtype) -> Tensor | None:
        """All experts' `(experts, d_out, d_in)` as they lie, where they are floats of that type and can be multiplied with so."""
        if not self.is_float:
            return None
        held = next(self.parameters())
        turned = held.transpose(1, 2) if self.transposed else held
        return turned if held.dtype == dtype and is_aligned(turned) else None

    def __getitem__(self, number: Any) -> Tensor:
        raise UsageError(
            f"the model reads a stack of experts that is held as {self.storage}, and would find packed bytes; accepted: the "
            "experts implementation that load_frozen sets, or a storage of floats (bf16, fp16, fp32)"
        )

    def extra_repr(self) -> str:
        d_out, d_in = self.expert_shape
        return f"{self.experts} experts, {d_in}, {d_out}, storage={self.storage}"


def hit(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have tokens, and their rows."""
    first = 0
    for number, count in enumerate(counts):
        if count:
            yield number, slice(first, first + count)
        first += count


class _Routed:
    """The stack as one linear map on sorted rows (`LinearMap`)."""

    def __init__(self, stack: FrozenStack, counts: Sequence[int]) -> None:
        self.stack, self.counts = stack, counts

    def product(self, x: Tensor) -> Tensor:
        if in_groups(x):
            return self._in_groups(x, back=False)
        y = x.new_zeros(x.shape[0], self.stack.expert_shape[0])
        for number, rows in hit(self.counts):
            y[rows] = self.stack.expert(number).product(x[rows])
        return y

    def transposed_product(self, g: Tensor) -> Tensor:
        if in_groups(g):
            return self._in_groups(g, back=True)
        x = g.new_zeros(g.shape[0], self.stack.expert_shape[1])
        for number, rows in hit(self.counts):
            x[rows] = self.stack.expert(number).transposed_product(g[rows])
        return x

    def _in_groups(self, x: Tensor, back: bool) -> Tensor:
        stack, hits = self.stack, list(hit(self.counts))
        whole, routed = stack.matrices(x.dtype), sum(self.counts)
        if whole is None:
            return grouped_products(
                x,
                hits,
                stack.expert_shape,
                lambda number, kind: stack.expert(number).entries(kind),
                at_once=stack.at_once,
                back=back,
            )
        whole = whole[: len(self.counts)]
        made = multiply(x[:routed], whole if back else whole.transpose(1, 2), list(accumulate(self.counts)))
        return made if routed == len(x) else torch.cat([made, made.new_zeros(len(x) - routed, made.shape[1])])


class _Together:
    """Every expert's product with its own rows, all made when the first is asked for."""

    def __init__(self, stack: FrozenStack, counts: Sequence[int], x: Tensor, pieces: Sequence[Tensor]) -> None:
        self.map, self.x = _Routed(stack, counts), x
        self.places = {number: place for place, (number, _) in enumerate(hit(counts))}
        self.pieces = pieces
        self.made: tuple[Tensor, ...] | None = None

    def is_asked(self, number: int, x: Tensor) -> bool:
        return x is self.pieces[self.places[number]]

    def product(self, number: int) -> Tensor:
        if self.made is None:
            self.made = through(self.map, self.x).split([len(piece) for piece in self.pieces])
        return self.made[self.places[number]]


class ExpertOperator:
    """One expert of a stack as an operator: what a method computes with inside the stack's forward. It keeps the stack and reads
    its parameters anew in backward.

    Arguments:
        together: within a forward, the products of all experts with their own rows. A method that asks for the product with
            other rows than its own (scaled ones) is given that alone.
    """

    bias = None

    def __init__(self, stack: FrozenStack, number: int, together: _Together | None = None) -> None:
        self.stack, self.number = stack, number
        self.out_features, self.in_features = stack.expert_shape
        self.training, self.together = stack.training, together
        self.is_float, self.origin = stack.is_float, stack.origin

    def __call__(self, x: Tensor, gate: Gate | None = None, branch: Tensor | None = None) -> Tensor:
        if gate is None and self.together is not None and self.together.is_asked(self.number, x):
            return self.together.product(self.number)
        return through(self, x) if gate is None else through_gate(self, x, gate, branch)

    def product(self, x: Tensor) -> Tensor:
        return self.stack.expert(self.number).product(x)

    def transposed_product(self, g: Tensor) -> Tensor:
        return self.stack.expert(self.number).transposed_product(g)

    def gated_product(self, x: Tensor, branch: Tensor, gate: Gate) -> Tensor:
        return self.stack.expert(self.number).gated_product(x, branch, gate)

    def gated_gradients(
        self, g: Tensor, branch: Tensor, gate: Gate, apart: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        return self.stack.expert(self.number).gated_gradients(g, branch, gate, apart)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.stack.parameters()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.stack.expert(self.number).dense(dtype)


def pack_stack(
    weights: Tensor,
    storage: str,
    *,
    transposed: bool = False,
    origin: Origin | None = None,
    name: str = "",
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    **options: Any,
) -> FrozenStack:
    """Hold a stack of experts frozen in the named storage, each expert as `pack` holds a matrix.

    Arguments:
        weights: `(experts, d_out, d_in)`, or `(experts, d_in, d_out)` where `transposed`; float32, bfloat16 or float16.
        name, compute_dtype: as `PackedLinear` has them.
        device: where the packed tensors go; unset: where the weights are.

    Raises:
        UsageError: as `pack`.
    """
    place, kind = device or weights.device, storage_info(storage).dtype
    if kind is not None:
        held = weights if weights.dtype == kind and weights.device == place else weights.to(place, kind)
        return adopt_stack(held, tuple(held.shape), transposed=transposed, origin=origin)
    one = pack(weights[0].detach().to(place), storage, transposed=transposed, **options)
    if isinstance(one, PackedLinear):
        one.name, one.compute_dtype = name, compute_dtype
    tensors = {n: p.new_empty((len(weights), *p.shape)) for n, p in one.named_parameters()}
    plain = []
    for number, weight in enumerate(weights):
        packed = pack(weight.detach().to(place), storage, transposed=transposed, **options) if number else one
        for own, parameter in packed.named_parameters():
            tensors[own][number] = parameter
        plain.append(packed.plain_values())
    return FrozenStack(one, tensors, plain, transposed=transposed, origin=origin)


def adopt_stack(
    weights: Tensor, shape: tuple[int, ...], *, transposed: bool, origin: Origin | None = None
) -> FrozenStack:
    """A stack of floats as it is: a parameter stays the same object, split or not.

    Arguments:
        shape: of the whole stack, `(experts, d_out, d_in)`, or `(experts, d_in, d_out)` where `transposed`.
    """
    experts, *sides = shape
    d_out, d_in = sides[::-1] if transposed else sides
    one = DenseLinear(weights.new_empty(0), (d_out, d_in), transposed=transposed, bias=None, origin=None)
    return FrozenStack(one, {one.matrix_name: weights}, [{}] * experts, transposed=transposed, origin=origin)
