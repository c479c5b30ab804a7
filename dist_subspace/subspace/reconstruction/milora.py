"""MiLoRA (arXiv 2406.09044): `W' = W_res + γ B A`, where A and B start at the r smallest singular triplets of W.

As PiSSA otherwise (`residual.py`). Small σ make small factors and small gradients; where W lacks rank they are zero, and stay
there. Later rounds of a folded residual's quantisation fit what it left: its largest triplets, since the smallest of an error
would be nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_subspace.options import choice
from dist_subspace.subspace.blocks.residual import ITERATIONS, NOTICE, REFUSAL, RESIDUAL, Pair, ResidualLinear
from dist_subspace.subspace.blocks.svd import largest, smallest
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo


@register(
    MethodInfo(
        name="milora",
        category="reconstruction, mode 2",
        reference="2406.09044",
        summary="the smallest singular triplets trained as a low-rank pair, the rest frozen",
        learning_rate=LearningRate(
            3e-3, 3e-3, 3e-4, "LLaMA-2-7B in the method's repository", effect=by_alpha, effect_text="√α"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=1.0,
        uses_dropout=True,
        statistic="full SVD",
        constraints=("mpc_o", "mpc_d"),
        notices={"mpc_o": NOTICE, "mpc_d": NOTICE},
        refusals={"mpc_n": REFUSAL},
        options={
            **RESIDUAL,
            **ITERATIONS,
            "svd": choice("exact", "how the singular triplets are found: the smallest have no shortcut"),
        },
        count="r (d_in + d_out)",
    )
)
class Milora(ResidualLinear):
    def split(self, matrix: Tensor, generator: torch.Generator) -> Pair:
        return smallest(matrix, self.settings.rank).balanced(self.scale)

    def refit(self, matrix: Tensor, generator: torch.Generator) -> Pair:
        return largest(matrix, self.settings.rank, generator).balanced(self.scale)
