"""LoRA (arXiv 2106.09685): `y = W x + γ B (A D(x))`, `γ = α / r`, `D` dropout on the adapter's branch.

`A (r, d_in)` Kaiming-uniform with a = √5, that is U(-1/√d_in, 1/√d_in); `B (d_out, r)` zero: identity at the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_subspace.subspace.low_rank import LowRankUpdate
from dist_subspace.subspace.method import MethodInfo, Option, Settings, SubspaceLinear
from dist_subspace.subspace.registry import register


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
        options={"init": Option("kaiming", "initial values of A", accepted=("kaiming", "gaussian"))}
        | {"lr_ratio": Option(1.0, "learning rate of B over that of A (LoRA+, arXiv 2402.12354)")},
        peft_type="LORA",
        count="r (d_in + d_out)",
    )
)
class Lora(SubspaceLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.scale = settings.alpha / settings.rank
        a = torch.empty(settings.rank, self.in_features)
        if settings.options["init"] == "gaussian":
            a.normal_(std=1 / settings.rank, generator=generator)
        else:
            bound = 1 / math.sqrt(self.in_features)
            a.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, settings.rank))

    def transform(self, x: Tensor) -> Tensor:
        dropout = self.settings.dropout if self.training else 0.0
        return LowRankUpdate.apply(self.base(x), x, self.lora_A, self.lora_B, self.scale, dropout)

    def merged(self, weight: Tensor) -> Tensor:
        update = self.lora_B.to(torch.float32) @ self.lora_A.to(torch.float32)
        return (weight.float() + self.scale * update.to(weight.device)).to(weight.dtype)

    def file_tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A.detach(), "lora_B.weight": self.lora_B.detach()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.lora_A.data.copy_(tensors["lora_A.weight"])
        self.lora_B.data.copy_(tensors["lora_B.weight"])
