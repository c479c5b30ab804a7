"""rsLoRA (arXiv 2312.03732): LoRA with `γ = α / √r`, so that a higher rank does not learn more slowly."""

from __future__ import annotations

import math
from typing import Any

from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.extension.lora import LORA_OPTIONS, Lora


@register(
    MethodInfo(
        name="rslora",
        category="extension",
        reference="2312.03732",
        summary="LoRA scaled by the root of its rank: W + (α/√r) B A",
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
class RsLora(Lora):
    def scaling(self, settings: Settings) -> float:
        return settings.alpha / math.sqrt(settings.rank)

    @classmethod
    def peft_config(cls, settings: Settings) -> dict[str, Any]:
        return super().peft_config(settings) | {"use_rslora": True}
