"""Parallel adapter (arXiv 2110.04366; arXiv 2407.05417, eq. 30): `y = W x + c B D(ReLU(A x))`.

Initial values as LoRA's: B zero, identity at the start. The strength c is fixed, or trained (`learned_scale`) as the
deviation from its initial value. Dropout comes after the activation. Not mergeable: the branch is no matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace.options import flag, number
from dist_subspace.subspace.blocks.dropout import drop
from dist_subspace.subspace.blocks.low_rank import Down, LowRankPair, Up
from dist_subspace.subspace.core.learning_rate import Factors, LearningRate, by_rank
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings


def _effect(settings: Factors) -> float:
    return by_rank(settings) * math.sqrt(abs(settings.options["scale"]))


@register(
    MethodInfo(
        name="parallel-adapter",
        category="extension",
        reference="2110.04366",
        summary="a bottleneck with a ReLU beside the frozen matrix: W x + c B ReLU(A x)",
        learning_rate=LearningRate(3e-3, 3e-3, 2e-4, "as LoRA's", effect=_effect, effect_text="√(r scale)"),
        uses_rank=True,
        rank=16,
        uses_alpha=False,
        uses_dropout=True,
        mergeable=False,
        constraints=("mpc_o", "mpc_d"),
        refusals={"mpc_n": "it has a nonlinearity between its factors already"},
        options={
            "scale": number(1.0, "strength c of the branch"),
            "learned_scale": flag(False, "train c too, one number a layer"),
        },
        count="r (d_in + d_out)",
    )
)
class ParallelAdapter(LowRankPair):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        if settings.options["learned_scale"]:
            self.adapter_scale = nn.Parameter(torch.zeros(1))

    def scaling(self, settings: Settings) -> float:
        return float(settings.options["scale"])

    def strength(self) -> Tensor | float:
        """c."""
        return self.scale + self.adapter_scale.float() if self.settings.options["learned_scale"] else self.scale

    def transform(self, x: Tensor) -> Tensor:
        hidden = functional.relu(Down.apply(x, self.lora_A, 0.0))
        hidden = drop(hidden, self.settings.dropout if self.training else 0.0)
        return Up.apply(self.base(x), (self.strength() * hidden).to(x.dtype), self.lora_B)

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = super().file_tensors()
        if self.settings.options["learned_scale"]:
            tensors["adapter_scale"] = self.scale + tensors["adapter_scale"].float()
        return tensors

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        if self.settings.options["learned_scale"]:
            self.adapter_scale.data.copy_(tensors["adapter_scale"] - self.scale)
