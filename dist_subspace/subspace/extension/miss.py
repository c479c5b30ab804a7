"""MiSS, matrix shard sharing (arXiv 2409.15371): one trained block D stands for every shard of r input features.

    y = W x + Dᵀ h,   h (r) = the sum of D(x)'s shards: h_j = Σ_i x_i over all i with i mod r = j

`D (r, d_out)` zero: identity at the start. Without a factor γ; where r does not divide d_in, the last shard is cut short. With
the option `mini_r` D is `(r, mini_r)` and repeats along the outputs (PEFT's `init_weights: mini`). Backward needs h (r numbers a
token) and not x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.errors import UsageError
from dist_subspace.options import whole
from dist_subspace.subspace.blocks.deviation import wide
from dist_subspace.subspace.blocks.dropout import drop
from dist_subspace.subspace.blocks.low_rank import Up
from dist_subspace.subspace.core.forms import LowRankForm
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.operator import Operator
from dist_subspace.subspace.core.peft_words import Entries, FromPeft, PeftWords, Shapes
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.sites import OwnRankBound
from dist_subspace.subspace.core.spec import EXPERT_PARAMETERS, MethodInfo, Settings


@register(
    MethodInfo(
        name="miss",
        category="extension",
        reference="2409.15371",
        summary="one trained block that all shards of the inputs share",
        learning_rate=LearningRate(1e-3, 3e-4, 3e-5, "as its forerunner Bone's on LLaMA-2-7B"),
        uses_rank=True,
        rank=64,
        uses_alpha=False,
        uses_dropout=True,
        capped=True,
        options={"mini_r": whole(None, "so many columns of D, repeated along the outputs (null: d_out)")},
        count="r d_out, or r mini_r",
        on_experts=EXPERT_PARAMETERS,
    )
)
class Miss(LowRankForm, OwnRankBound):
    @classmethod
    def largest_rank(cls, site: nn.Module) -> int | None:
        return site.in_features if isinstance(site, Operator) else None

    @classmethod
    def check_site(cls, site: Any, settings: Settings, known: bool) -> None:
        columns = settings.options["mini_r"] or site.out_features
        if site.out_features % columns:
            raise UsageError(
                f"subspace.options.mini_r is {columns}, but a target has {site.out_features} outputs; accepted: null, or a "
                "divisor of every target's outputs"
            )

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        columns = settings.options["mini_r"] or self.out_features
        self.miss_block = nn.Parameter(torch.zeros(settings.rank, columns))

    def up(self) -> Tensor:
        """`Dᵀ (d_out, r)`, its rows repeated where D has fewer columns than there are outputs."""
        return self.miss_block.t().repeat(self.out_features // self.miss_block.shape[1], 1)

    def transform(self, x: Tensor) -> Tensor:
        hidden = shard_sums(drop(x, self.settings.dropout if self.training else 0.0), self.settings.rank)
        return Up.apply(self.base(x), hidden.reshape(-1, self.settings.rank).t(), self.up())

    def merged(self, weight: Tensor) -> Tensor:
        shards = -(-self.in_features // self.settings.rank)
        return weight + wide(self.up()).repeat(1, shards)[:, : self.in_features].to(weight.device)

    def low_rank_form(self) -> tuple[Tensor, Tensor]:
        up = self.up().detach().float()
        rank = self.settings.rank
        sums = torch.eye(rank, device=up.device).repeat(1, -(-self.in_features // rank))[:, : self.in_features]
        return sums, up


def shard_sums(x: Tensor, rank: int) -> Tensor:
    """`(..., r)`: the sum of the shards of r features of `x (..., d_in)`, the last one filled up with zeros."""
    padded = functional.pad(x, (0, -x.shape[-1] % rank))
    # Autocast may add up in float32: the product that follows keeps the type of x in its backward.
    shards: Tensor = padded.unflatten(-1, (-1, rank))
    return shards.sum(-2).to(x.dtype)


@register_peft(Miss)
class MissWords(PeftWords[Miss]):
    peft_type = "MISS"
    on_conv1d = False
    tensor_prefix = "miss_"
    suffixes: ClassVar[Mapping[str, str]] = {"miss_block": "miss_block"}
    defaults: ClassVar[Entries] = {"r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True, "bias": "none"}

    def entries(self, settings: Settings) -> dict[str, Any]:
        columns = settings.options["mini_r"]
        return {
            "r": settings.rank,
            "miss_dropout": settings.dropout,
            "mini_r": columns or 1,
            "init_weights": "mini" if columns else True,
            "bias": "none",
        }

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        layers = self.by_layer(tensors)
        variant, rank = described.get("init_weights", True), int(described["r"])
        if variant == "bat":
            raise UsageError(
                "init_weights is 'bat', whose update is made of blocks of the frozen matrix itself, so that it is no product "
                "with it; accepted: True, mini"
            )
        columns = int(described["mini_r"]) if variant == "mini" else None
        for name, held in layers.items():
            rows, width = held["miss_block"].shape
            if rows != rank or width != (columns or width):
                raise UsageError(
                    f"the adapter holds {name}.miss_block as {[rows, width]}, which its configuration contradicts; it is damaged"
                )
        shapes: Shapes = {n: (None if columns else held["miss_block"].shape[1], None) for n, held in layers.items()}
        dropout = float(described.get("miss_dropout") or 0.0)
        return FromPeft(layers, shapes=shapes, rank=rank, dropout=dropout, options={"mini_r": columns})
