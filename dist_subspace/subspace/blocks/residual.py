"""Methods whose A and B start at a part of W (PiSSA, MiLoRA, OLoRA), so that the rest of W must stand beside them:

    stacked   y = W x + γ (B A - B0 A0) x           the base untouched, identity exact in every storage
    fold      y = Q(W - γ B0 A0) x + γ B A D(x)     the base holds the residual; what Q rounds off is missing at the start

A0 and B0 are the initial A and B, exact in the computation's type. Both forms keep them: the file must be able to fold again,
and a merge onto the checkpoint's own W subtracts them. `fold` takes a quantised layer's original W, in one round or several
(QPiSSA); `stacked` the W that the forward really uses (docs/methods.md, "Quantised bases").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.options import Option, choice, whole
from dist_subspace.subspace.blocks.deviation import DeviationUpdate, FrozenPair, PinnedUpdate, wide
from dist_subspace.subspace.blocks.low_rank import LowRankLinear, LowRankUpdate
from dist_subspace.subspace.core.operator import Weight, no_original
from dist_subspace.subspace.core.spec import Settings, SubspaceConfig
from dist_subspace.subspace.core.statistic import FoldsIntoBase

Pair = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r)
Split = Callable[[Tensor], Pair]
Quantiser = Callable[[Tensor], Tensor]

RESIDUAL: dict[str, Option] = {
    "residual": choice("stacked", "where -γ B0 A0 goes: into a frozen pair beside A and B, or into the base", "fold")
}
NOTICE = "it pulls the factors away from the spectrum that they start with"
REFUSAL = "a nonlinearity between factors that do not start at zero would break the identity at the start"


ITERATIONS: dict[str, Option] = {
    "iterations": whole(1, "rounds of decomposition and quantisation, for residual: fold (QPiSSA)")
}


@dataclass(frozen=True)
class Fit:
    """One round's pair; the pair that was taken out of W before its quantisation; and the Frobenius norm of what frozen and
    trained matrix together are off W."""

    pair: Pair
    taken: Pair
    error: float


def qpissa(matrix: Tensor, quantised: Quantiser, first: Split, then: Split, scale: float, rounds: int) -> Iterator[Fit]:
    """`R ← W`; each round: `(A, B) ← split of R`, `Ŵ ← Q(W - γ B A)`, `R ← W - Ŵ`."""
    rest = matrix
    for number in range(rounds):
        pair = (then if number else first)(rest)
        product = product_of(pair, scale)
        rest = matrix - quantised(matrix - product)
        yield Fit(pair, pair, float((rest - product).norm()))


def loftq(
    matrix: Tensor, quantised: Quantiser, split: Split, nothing: Pair, scale: float, rounds: int
) -> Iterator[Fit]:
    """`L ← 0`; each round: `Ŵ ← Q(W - L)`, `L ← rank-r split of W - Ŵ` (arXiv 2310.08659). `nothing` is a pair of zeros."""
    taken = nothing
    for _ in range(rounds):
        rest = matrix - quantised(matrix - product_of(taken, scale))
        pair = split(rest)
        yield Fit(pair, taken, float((rest - product_of(pair, scale)).norm()))
        taken = pair


def best(fits: Iterator[Fit]) -> Fit:
    """More rounds are not always better: the first of the best."""
    return min(fits, key=lambda fit: fit.error)


def product_of(pair: Pair, scale: float) -> Tensor:
    """`γ B A`."""
    return scale * pair[1] @ pair[0]


class AnchoredLinear(LowRankLinear, FoldsIntoBase):
    """A low-rank pair that starts at a pair of its own, and remembers it as the frozen `lora_A0`, `lora_B0`."""

    kept_factors: tuple[str, ...] = ("lora_A0", "lora_B0")

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        self.lora_A.data.copy_(self.rounded(factors["lora_A0"]))
        self.lora_B.data.copy_(self.rounded(factors["lora_B0"]))
        for name in self.kept_factors:
            frozen = factors[name].to(self.compute_dtype).contiguous()
            setattr(self, name, nn.Parameter(frozen, requires_grad=False))

    def rounded(self, t: Tensor) -> Tensor:
        """To what the computation's type can hold, which 16-bit copies then lose nothing of."""
        return t.to(self.compute_dtype).to(t.dtype) if self.compute_dtype.itemsize < t.element_size() else t

    def rounded_pair(self, pair: Pair) -> Pair:
        return self.rounded(pair[0]), self.rounded(pair[1])

    def frozen_pair(self) -> FrozenPair:
        return self.factor("lora_A0"), self.factor("lora_B0"), self.scale

    def difference(self) -> Pair:
        """`(A', B')` with 2r terms, `B' A' = γ (B A - B0 A0)`, from small deviations rather than large products."""
        a0, b0, _ = self.frozen_pair()
        a, b, a0, b0 = (wide(t.detach()) for t in (self.lora_A, self.lora_B, a0, b0))
        return torch.cat([a, a - a0]), self.scale * torch.cat([b - b0, b0], 1)

    def merged_onto_original(self, weight: Tensor) -> Tensor:
        a0, b0, _ = self.frozen_pair()
        a, b, a0, b0 = (wide(t) for t in (self.lora_A, self.lora_B, a0, b0))
        shift = (b - b0) @ a + b0 @ (a - a0)
        return weight + self.scale * shift.to(weight.device)


class ResidualLinear(AnchoredLinear):
    """The base of PiSSA, MiLoRA and OLoRA: they say which part of W the pair starts at."""

    def split(self, matrix: Tensor, generator: torch.Generator) -> Pair:
        """The initial A and B for `matrix (d_out, d_in)`, in its type."""
        raise TypeError(f"{type(self).__name__} does not say what it starts at")

    def refit(self, matrix: Tensor, generator: torch.Generator) -> Pair:
        """What later rounds of quantisation make of what is left of W."""
        return self.split(matrix, generator)

    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        options = settings.options
        if options.get("iterations", 1) > 1 and options["residual"] != "fold":
            raise UsageError(
                f"subspace.options.iterations is {options['iterations']}, but a stacked residual is quantised in no round; "
                "accepted: 1, or residual: fold"
            )
        return settings

    @classmethod
    def check_site(cls, site: Any, settings: Settings, known: bool) -> None:
        rounds = settings.options.get("iterations", 1)
        if rounds > 1 and site.is_float and not known:
            raise UsageError(
                f"subspace.options.iterations is {rounds}, but the frozen weights are not quantised: there is nothing to fit; "
                "accepted: 1, or a quantised storage"
            )
        if settings.options["residual"] == "fold" and not site.is_float and site.origin is None:
            no_original()

    @property
    def rebases(self) -> bool:
        return bool(self.settings.options["residual"] == "fold")

    def decompose(self, weight: Weight) -> dict[str, Tensor]:
        def first(matrix: Tensor) -> Pair:
            return self.rounded_pair(self.split(matrix, weight.generator))

        def then(matrix: Tensor) -> Pair:
            return self.rounded_pair(self.refit(matrix, weight.generator))

        rounds = self.settings.options.get("iterations", 1)
        if rounds == 1:
            a, b = first(self._source(weight))
        else:
            assert weight.quantised is not None  # see check_site
            a, b = best(qpissa(weight.original(), weight.quantised, first, then, self.scale, rounds)).pair
        return {"lora_A0": a, "lora_B0": b}

    def rebased(self, factors: Mapping[str, Tensor], weight: Weight) -> Tensor:
        source = self._source(weight)
        pair = self.rounded_pair((factors["lora_A0"].to(source), factors["lora_B0"].to(source)))
        return source - product_of(pair, self.scale)

    def _source(self, weight: Weight) -> Tensor:
        """The W that the residual is of."""
        return weight.original() if self.rebases and weight.quantised is not None else weight.matrix

    def transform(self, x: Tensor) -> Tensor:
        z, dropout = self.base(x), self.settings.dropout if self.training else 0.0
        if not self.rebases and dropout == 0:
            return DeviationUpdate.apply(z, x, self.lora_A, self.lora_B, self, True, 0.0)
        if not self.rebases:  # dropout is the trained branch's alone
            z = PinnedUpdate.apply(z, x, self.frozen_pair, -1.0)
        return LowRankUpdate.apply(z, x, self.lora_A, self.lora_B, self.scale, dropout)

    def untransformed(self, x: Tensor) -> Tensor:
        return PinnedUpdate.apply(self.base(x), x, self.frozen_pair, 1.0) if self.rebases else self.base(x)

    def merged(self, weight: Tensor) -> Tensor:
        return super().merged(weight) if self.rebases else self.merged_onto_original(weight)

    def low_rank_form(self) -> Pair | None:
        """Relative to the matrix that the model had before, folded or not."""
        return self.difference()
