"""LoRA (arXiv 2106.09685): `y = W x + γ B (A D(x))`, `γ = α / r`, `D` dropout on the adapter's branch.

`A (r, d_in)` Kaiming-uniform with a = √5, that is U(-1/√d_in, 1/√d_in); `B (d_out, r)` zero: identity at the start. With
`init: loftq` both start at a fit of the base's rounding error (`loftq.py`), which is meant not to be the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_subspace.options import choice, number, whole
from dist_subspace.subspace.blocks.loftq import LoftqLinear
from dist_subspace.subspace.core.rates import LearningRateRatio
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings

LORA_OPTIONS = {
    "init": choice("kaiming", "initial values of A; loftq: of A and B, on a quantised base", "gaussian", "loftq"),
    "iterations": whole(1, "rounds of quantisation and fit, for init: loftq"),
    "lr_ratio": number(1.0, "learning rate of B over that of A (LoRA+, arXiv 2402.12354)", above=0),
}


@register(
    MethodInfo(
        name="lora",
        category="extension",
        reference="2106.09685",
        summary="a low-rank matrix beside the frozen one: W + (α/r) B A",
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=("mpc_o", "mpc_d", "mpc_n"),
        options=LORA_OPTIONS,
        peft_type="LORA",
        count="r (d_in + d_out)",
    )
)
class Lora(LoftqLinear, LearningRateRatio):
    left_factors = ("lora_B",)

    def initial_a(self, settings: Settings, generator: torch.Generator) -> Tensor:
        if settings.options["init"] == "gaussian":
            return torch.empty(settings.rank, self.in_features).normal_(std=1 / settings.rank, generator=generator)
        return super().initial_a(settings, generator)
