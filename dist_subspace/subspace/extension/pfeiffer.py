"""Pfeiffer adapters (arXiv 2005.00247): one bottleneck a block, behind the FFN.

Pre-norm blocks: `z + Ad(z)` for the FFN's output z, before the residual. Post-norm encoders (BERT and its kin):
`LN(u + Ad(LN(u)))` around the block's output norm, where `u = z + x_res` is the sum with the residual.
`Ad(h) = W_up σ(W_dn h + b_dn) + b_up` with a bottleneck of `rank` values; `W_up` zero: identity at the start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_subspace.families.norms import post_norm
from dist_subspace.options import choice
from dist_subspace.subspace.blocks.bottleneck import BottleneckLinear, BottleneckNorm
from dist_subspace.subspace.blocks.norm_part import norm_width
from dist_subspace.subspace.core.learning_rate import LearningRate, by_rank
from dist_subspace.subspace.core.operator import Operator
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.sites import OwnRankBound, OwnSites, smaller_side
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.core.targets import Choice


@register(
    MethodInfo(
        name="pfeiffer",
        category="extension",
        reference="2005.00247",
        summary="a bottleneck behind each FFN: z + Ad(z)",
        learning_rate=LearningRate(
            1e-2, 3e-3, 3e-4, "LoRA's on LLaMA-2-7B in MiLoRA's repository", effect=by_rank, effect_text="√r"
        ),
        targets="FFN outputs",
        uses_rank=True,
        rank=64,
        capped=True,
        mergeable=False,
        options={"activation": choice("relu", "of the bottleneck", "swish", "gelu", "tanh")},
        count="(2 d + 1) r + d",
    )
)
class Pfeiffer(BottleneckLinear, OwnSites, OwnRankBound):
    @classmethod
    def sites(cls, choice: Choice) -> dict[str, nn.Module]:
        if choice.given:
            return choice.operators()
        outputs = choice.ffn_outputs()
        return choice.in_order({post_norm(choice.model, name) or name for name in outputs})

    @classmethod
    def largest_rank(cls, site: nn.Module) -> int | None:
        return smaller_side(site) or norm_width(site)

    @classmethod
    def build(cls, site: nn.Module, settings: Settings, generator: torch.Generator, shared: Any = None) -> SubspacePart:
        if isinstance(site, Operator):
            return super().build(site, settings, generator, shared)
        return PfeifferNorm(site, settings, norm_width(site), generator)


class PfeifferNorm(BottleneckNorm):
    """A post-norm block's output norm with its bottleneck."""

    info = Pfeiffer.info
