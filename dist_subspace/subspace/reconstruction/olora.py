"""OLoRA (arXiv 2406.01775): `W' = W_res + γ B A`, where A and B start at the head of W's QR decomposition.

`W = Q R`, `B0 = Q_r` (the first r columns), `A0 = R_r` (the first r rows), `W_res = W - γ B0 A0`: the literal factors, as PEFT
has them. The residual is stacked or folded (`residual.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_subspace.subspace.blocks.residual import NOTICE, REFUSAL, RESIDUAL, Pair, ResidualLinear
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import MethodInfo
from dist_subspace.subspace.extension.lora import LoraWords


@register(
    MethodInfo(
        name="olora",
        category="reconstruction, mode 2",
        reference="2406.01775",
        summary="the head of the QR decomposition trained as a low-rank pair, the rest frozen",
        learning_rate=LearningRate(
            3e-3, 1e-3, 6e-5, "as PiSSA's, whose factors are a part of W too", effect=by_alpha, effect_text="√α"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=1.0,
        uses_dropout=True,
        statistic="QR",
        constraints=("mpc_o", "mpc_d"),
        notices={"mpc_o": NOTICE, "mpc_d": NOTICE},
        refusals={"mpc_n": REFUSAL},
        options=RESIDUAL,
        count="r (d_in + d_out)",
    )
)
class Olora(ResidualLinear):
    def split(self, matrix: Tensor, generator: torch.Generator) -> Pair:
        # The first r columns of Q come from the first r columns of W alone.
        q = torch.linalg.qr(matrix[:, : self.settings.rank]).Q
        return q.t() @ matrix, q


@register_peft(Olora)
class OloraWords(LoraWords):
    """For import alone: a file of ours holds the factors that it started from too."""

    on_experts = False
    writes = False
    start = "olora"
