"""A frozen weight as a linear operator: apply it, ask its shape, and (at set-up and merge) make it dense.

Every storage is a subclass that says how its tensors become a matrix. What they share is here: the product, its backward,
and the rule that keeps sharded training small: *nothing of the weight is saved for backward*. The autograd node keeps the
module, and reads the module's parameters again when the gradient arrives; by then a sharding engine has gathered them
anew. A saved view would keep every layer's gathered bytes alive from forward to backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.linear_map import Gate, RowPiece, RowSource, product_type, through, through_gate

# Entries of a matrix that are edited at a time; in smaller pieces the calls would cost more than the work.
TILE = 1 << 18
# Entries of a packed matrix that are decoded at a time, where that is asked for: 64 MiB in 16 bits.
DECODED = 1 << 25
# Pieces of a matrix that has more than so many of them: fewer calls, and a piece is still little beside the matrix.
TILES = 32


@dataclass(frozen=True)
class Origin:
    """Where a frozen matrix was read from: a safetensors file and the key in it (docs/methods.md, "The original weight")."""

    file: str
    key: str


class FrozenLinear(nn.Module):
    """`y = W x + b` for a frozen `W` of logical shape `(out_features, in_features)`, held in some storage.

    Arguments:
        in_features, out_features: the logical shape, whatever the layout of the bytes.
        tensors: the tensors that hold the matrix, packed bytes and statistics alike; each becomes a frozen parameter, so
            that a sharding engine splits all of them.
        bias: `(out_features,)` or None.
        origin: where the matrix came from, if it was read from a file.

    `forward` takes `(..., in_features)` in float32, bfloat16 or float16 and returns `(..., out_features)` in the same type. With
    a gate it returns `W x + (W ⊙ Δ) branch`, where the branch is x if none is given.
    """

    storage: str
    # The parameter that holds the matrix; the others hold what its codes mean.
    matrix_name: str
    bias: nn.Parameter | None
    # Where the matrix is whole on no rank, and used all the same: its rows, and its bias. Both are collective.
    row_source: RowSource | None = None
    bias_source: Callable[[], Tensor | None] | None = None
    # Whether the layer was a Conv1D, whose checkpoint holds `(in_features, out_features)`; whatever the bytes' own layout.
    conv1d: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensors: Mapping[str, Tensor],
        *,
        bias: Tensor | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.origin = origin
        for name, tensor in tensors.items():
            self.register_parameter(name, frozen(tensor))
        self.register_parameter("bias", None if bias is None else frozen(bias))

    # What a storage provides.

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The matrix `(out_features, in_features)` in the given type, from the parameters as they are now (maybe a view)."""
        raise TypeError(f"{type(self).__name__} does not say how it becomes a matrix")

    def entries(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """A matrix and one factor a row `(out_features,)` that turns it into W; None for ones. A storage whose codes are exact
        in `dtype` can so scale the product instead of the matrix."""
        return self.decode(dtype), None

    def repacked(self, matrix: Tensor) -> FrozenLinear:
        """Another matrix `(out_features, in_features)` in this operator's storage and layout: a new operator, without bias."""
        raise TypeError(f"{type(self).__name__} does not say how a matrix is packed")

    def options(self) -> dict[str, Any]:
        """The storage's options with which this matrix is held (`model.storage_options`)."""
        return {}

    def plain_values(self) -> dict[str, float]:
        """What belongs to the packed bytes but is no tensor (a double quantisation's offset)."""
        return {}

    def set_plain_values(self, values: Mapping[str, float]) -> None:
        """The inverse of `plain_values`."""
        for name, value in values.items():
            setattr(self, name, value)

    @property
    def takes_row_pieces(self) -> bool:
        """Whether it can work with rows of its parameter that it is handed (`row_source`)."""
        return False

    def row_pieces(self, dtype: torch.dtype) -> Iterator[RowPiece]:
        """The matrix in the given type, every row once, a piece at a time; collective where there is a `row_source`. A storage
        that decodes a few rows by themselves holds no more than these."""
        matrix = self.decode(dtype)
        yield RowPiece(matrix, ((0, 0, len(matrix)),))

    # What everyone uses.

    @property
    def is_in_pieces(self) -> bool:
        """Whether its rows come from elsewhere now: a matrix that is here after all is used as it is."""
        return self.row_source is not None and not self.get_parameter(self.matrix_name).numel()

    def whole_bias(self) -> Tensor | None:
        """Collective where there is a `bias_source`."""
        if self.bias_source is not None and self.bias is not None and not self.bias.numel():
            return self.bias_source()
        return self.bias

    def weights_in(self, name: str) -> int:
        """How many numbers of the layer the parameter called `name` stands for: packed bytes count as the weights that they
        hold, statistics as none."""
        if name == "bias":
            return self.out_features
        return self.in_features * self.out_features if name == self.matrix_name else 0

    def product(self, x: Tensor) -> Tensor:
        """`x W^T` for `x` of shape `(tokens, in_features)`; no autograd."""
        wide = product_type(x)
        matrix, factors = self.entries(wide)
        y = x.to(wide) @ matrix.t()
        return (y if factors is None else y.mul_(factors)).to(x.dtype)

    def transposed_product(self, g: Tensor) -> Tensor:
        """`g W` for `g` of shape `(tokens, out_features)`; no autograd."""
        wide = product_type(g)
        matrix, factors = self.entries(wide)
        rows = g.to(wide)
        return ((rows if factors is None else rows * factors) @ matrix).to(g.dtype)

    def gated_product(self, x: Tensor, branch: Tensor, gate: Gate) -> Tensor:
        """`x Wᵀ + branch (W ⊙ Δ)ᵀ`; no autograd. Two products: in 16 bits `W + W ⊙ Δ` would lose a Δ below 2^-9."""
        wide = product_type(x)
        matrix, factors = self.entries(wide)
        y, branch = x.to(wide) @ matrix.t(), branch.to(wide)
        for rows in self._tiles():
            y[:, rows].addmm_(branch, (matrix[rows] * gate.rows(rows, wide)).t())
        return (y if factors is None else y.mul_(factors)).to(x.dtype)

    def gated_gradients(
        self, g: Tensor, branch: Tensor, gate: Gate, apart: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Of x and the branch, or of the one input of both, and of the gate's factors, for `g (tokens, out_features)`."""
        matrix, factors = self.entries(product_type(g))
        given_type, branch = g.dtype, branch.to(matrix.dtype)
        g = g.to(matrix.dtype) if factors is None else g.to(matrix.dtype) * factors
        grads = gate.gradients((rows, (g[:, rows].t() @ branch).mul_(matrix[rows])) for rows in self._tiles())
        inner = torch.zeros_like(branch, dtype=torch.promote_types(branch.dtype, torch.float32))
        del branch  # a copy, where products are wider
        for rows in self._tiles():
            piece, change = matrix[rows], gate.rows(rows, g.dtype)
            inner += g[:, rows] @ (piece * change if apart else torch.addcmul(piece, piece, change))
        grad = inner.to(given_type)
        return ((g @ matrix).to(given_type), grad, grads) if apart else (grad, None, grads)

    def row_slices(self, together: int = 1, entries: int = DECODED) -> Iterator[slice]:
        """The rows in slices of about so many entries, each but the last of a multiple of `together` rows."""
        step = max(1, entries // (self.in_features * together)) * together
        return (slice(first, min(first + step, self.out_features)) for first in range(0, self.out_features, step))

    def _tiles(self) -> Iterator[slice]:
        """The rows in pieces of about `TILE` entries, or in `TILES` pieces if those are larger."""
        step = max(1, TILE // self.in_features, self.out_features // TILES)
        return (slice(first, min(first + step, self.out_features)) for first in range(0, self.out_features, step))

    @property
    def is_float(self) -> bool:
        """Whether the matrix is held in a floating type, unquantised."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def forward(self, x: Tensor, gate: Gate | None = None, branch: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = through(self, x) if gate is None else through_gate(self, x, gate, branch)
        bias = self.whole_bias()
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of the matrix that the forward really uses, `(out_features, in_features)`: for set-up and merge only."""
        return self.decode(dtype).clone(memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, storage={self.storage}, bias={self.bias is not None}"


def frozen(tensor: Tensor) -> nn.Parameter:
    """The tensor as a frozen parameter; a parameter stays the same object, because it may be shared or already sharded."""
    if isinstance(tensor, nn.Parameter) and type(tensor) is nn.Parameter:
        tensor.requires_grad = False
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)
