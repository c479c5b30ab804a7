"""LoftQ (arXiv 2310.08659), an initialisation of LoRA on quantised weights: A and B start at a fit of what rounding lost.

    L ← 0;  each round:  Ŵ ← Q(W - L),  L ← the r largest singular triplets of W - Ŵ,  in the end  γ B0 A0 = L

Q is the layer's own storage, and of several rounds the best is kept. The roots of L's singular values go to either factor,
and both are divided by √γ (PEFT leaves that out: right for γ = 1 only). From the second round on, the base holds `Q(W - L')`
with the L' of the round before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.subspace.blocks.deviation import FrozenPair, PinnedUpdate
from dist_subspace.subspace.blocks.residual import AnchoredLinear, Pair, best, loftq, product_of
from dist_subspace.subspace.blocks.svd import largest
from dist_subspace.subspace.core.operator import Weight, no_original
from dist_subspace.subspace.core.spec import Settings, SubspaceConfig


class LoftqLinear(AnchoredLinear):
    """A low-rank method that has the options `init` (loftq among others) and `iterations`; without it, plainly low-rank."""

    kept_factors: tuple[str, ...] = ()
    loftq_A: nn.Parameter  # the pair that was taken out of the base
    loftq_B: nn.Parameter

    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        init, rounds = settings.options["init"], settings.options["iterations"]
        if rounds > 1 and init != "loftq":
            raise UsageError(
                f"subspace.options.iterations is {rounds}, but init {init} fits nothing; accepted: 1, or init: loftq"
            )
        if init == "loftq" and settings.constraint is not None and settings.constraint.nonlinear:
            raise UsageError(
                "subspace.options.init is 'loftq', but under mpc_n the update is no matrix that could fit a rounding error; "
                "accepted: kaiming, gaussian"
            )
        return settings

    @classmethod
    def check_site(cls, site: Any, settings: Settings, known: bool) -> None:
        if settings.options["init"] != "loftq":
            return
        if site.is_float and not known:
            raise UsageError(
                "subspace.options.init is 'loftq', but the frozen weights are not quantised: there is nothing to fit; "
                "accepted: kaiming, gaussian, or a quantised storage"
            )
        if site.origin is None and (not known or settings.options["iterations"] > 1):
            no_original()

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        if self.fitted_start:
            self.kept_factors = AnchoredLinear.kept_factors + (("loftq_A", "loftq_B") if self.rebases else ())

    @property
    def fitted_start(self) -> bool:
        return bool(self.settings.options["init"] == "loftq")

    @property
    def setup_statistic(self) -> str:
        return "top-r SVD of the rounding error" if self.fitted_start else "none"

    @property
    def rebases(self) -> bool:
        return self.fitted_start and self.settings.options["iterations"] > 1

    def decompose(self, weight: Weight) -> dict[str, Tensor]:
        def split(matrix: Tensor) -> Pair:
            return self.rounded_pair(largest(matrix, self.settings.rank, weight.generator).balanced(self.scale))

        assert weight.quantised is not None  # see check_site
        matrix, rounds = weight.original(), self.settings.options["iterations"]
        nothing = matrix.new_zeros(self.lora_A.shape), matrix.new_zeros(self.lora_B.shape)
        fit = best(loftq(matrix, weight.quantised, split, nothing, self.scale, rounds))
        factors = dict(zip(AnchoredLinear.kept_factors, fit.pair, strict=True))
        return factors | (dict(zip(("loftq_A", "loftq_B"), fit.taken, strict=True)) if self.rebases else {})

    def rebased(self, factors: Mapping[str, Tensor], weight: Weight) -> Tensor:
        original = weight.original()
        taken = factors["loftq_A"].to(original), factors["loftq_B"].to(original)
        return original - product_of(self.rounded_pair(taken), self.scale)

    def untransformed(self, x: Tensor) -> Tensor:
        return PinnedUpdate.apply(self.base(x), x, self._taken, 1.0) if self.rebases else self.base(x)

    def _taken(self) -> FrozenPair:
        return self.loftq_A, self.loftq_B, self.scale

    def merged_onto_original(self, weight: Tensor) -> Tensor:
        return super().merged_onto_original(weight) if self.fitted_start else self.merged(weight)

    def low_rank_form(self) -> Pair | None:
        """Relative to `Q(W)`, which anyone can make; where the base holds something else, relative to W."""
        return self.difference() if self.rebases else super().low_rank_form()
