"""Houlsby adapters (arXiv 1902.00751): `z + Ad(z)` behind the output layer of each attention and each FFN, before the residual.

`Ad(h) = W_up σ(W_dn h + b_dn) + b_up` with a bottleneck of `rank` values; `W_up` zero: identity at the start. `train_norms`
trains the norms of the blocks too, as the paper does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_subspace.options import choice, flag
from dist_subspace.subspace.blocks.bottleneck import BottleneckLinear
from dist_subspace.subspace.blocks.norm_part import NormPart, norm_width
from dist_subspace.subspace.core.learning_rate import LearningRate, by_rank
from dist_subspace.subspace.core.operator import Operator
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.sites import OwnSites
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.core.targets import Choice


@register(
    MethodInfo(
        name="houlsby",
        category="extension",
        reference="1902.00751",
        summary="a bottleneck behind each attention and each FFN: z + Ad(z)",
        learning_rate=LearningRate(
            1e-2, 3e-3, 3e-4, "LoRA's on LLaMA-2-7B in MiLoRA's repository", effect=by_rank, effect_text="√r"
        ),
        targets="attention and FFN outputs",
        uses_rank=True,
        rank=64,
        capped=True,
        mergeable=False,
        options={
            "activation": choice("swish", "of the bottleneck", "relu", "gelu", "tanh"),
            "train_norms": flag(False, "train the norms of the blocks too"),
        },
        count="(2 d + 1) r + d",
    )
)
class Houlsby(BottleneckLinear, OwnSites):
    @classmethod
    def sites(cls, choice: Choice) -> dict[str, nn.Module]:
        linear = choice.operators() if choice.given else {**choice.attention_outputs(), **choice.ffn_outputs()}
        norms = choice.block_norms() if choice.options["train_norms"] else {}
        return choice.in_order({*linear, *norms})

    @classmethod
    def build(cls, site: nn.Module, settings: Settings, generator: torch.Generator, shared: Any = None) -> SubspacePart:
        if isinstance(site, Operator):
            return super().build(site, settings, generator, shared)
        has_bias = getattr(site, "bias", None) is not None
        return HoulsbyNorm(site, settings, norm_width(site), scaled=True, shifted=has_bias)


class HoulsbyNorm(NormPart):
    """A norm of a block, trained."""

    info = Houlsby.info
