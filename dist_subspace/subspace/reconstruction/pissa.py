"""PiSSA (arXiv 2404.02948): `W' = W_res + γ B A`, where A and B start at the r largest singular triplets of W.

`A0 = diag(√(σ_r/γ)) V_rᵀ`, `B0 = U_r diag(√(σ_r/γ))`, `W_res = W - γ B0 A0`; the residual is stacked or folded (`residual.py`).
Folded into a quantised base, with `iterations`, it is QPiSSA.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dist_subspace.options import choice
from dist_subspace.subspace.blocks.residual import ITERATIONS, NOTICE, REFUSAL, RESIDUAL, Pair, ResidualLinear
from dist_subspace.subspace.blocks.svd import largest, largest_exact
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.peft_words import Entries
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import OWN, MethodInfo
from dist_subspace.subspace.extension.lora import LoraWords


@register(
    MethodInfo(
        name="pissa",
        category="reconstruction, mode 2",
        reference="2404.02948",
        summary="the largest singular triplets trained as a low-rank pair, the rest frozen",
        learning_rate=LearningRate(
            3e-3, 1e-3, 6e-5, "from 2e-5 at rank 128 in the method's repository", effect=by_alpha, effect_text="√α"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=1.0,
        uses_dropout=True,
        statistic="top-r SVD",
        constraints=("mpc_o", "mpc_d"),
        notices={"mpc_o": NOTICE, "mpc_d": NOTICE},
        refusals={"mpc_n": REFUSAL},
        options={**RESIDUAL, **ITERATIONS, "svd": choice("randomized", "how the singular triplets are found", "exact")},
        count="r (d_in + d_out)",
        on_experts=(OWN,),
    )
)
class Pissa(ResidualLinear):
    def split(self, matrix: Tensor, generator: torch.Generator) -> Pair:
        rank = self.settings.rank
        exact = self.settings.options["svd"] == "exact"
        return (largest_exact(matrix, rank) if exact else largest(matrix, rank, generator)).balanced(self.scale)


@register_peft(Pissa)
class PissaWords(LoraWords):
    """For import alone: a file of ours holds the factors that it started from too."""

    writes = False
    on_experts = False
    start = "pissa"
    read_options: ClassVar[Entries] = {"svd": "exact"}
