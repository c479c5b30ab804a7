"""rsLoRA (arXiv 2312.03732): LoRA with `γ = α / √r`, so that a higher rank does not learn more slowly."""

from __future__ import annotations

import math
from typing import Any

from dist_subspace.subspace.core.learning_rate import Factors, LearningRate
from dist_subspace.subspace.core.peft_words import Entries
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import EXPERT_PARAMETERS, MethodInfo, Settings
from dist_subspace.subspace.extension.lora import LORA_OPTIONS, PLAIN_STARTS, Lora, LoraWords, lora_effect


def _effect(settings: Factors) -> float:
    return lora_effect(settings) * math.sqrt(math.sqrt(settings.rank))


@register(
    MethodInfo(
        name="rslora",
        category="extension",
        reference="2312.03732",
        summary="LoRA scaled by the root of its rank: W + (α/√r) B A",
        learning_rate=LearningRate(
            2e-3, 2e-3, 1e-4, "LoRA's over the fourth root of 16", effect=_effect, effect_text="√(α √r lr_ratio)"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=("mpc_o", "mpc_d", "mpc_n"),
        options=LORA_OPTIONS,
        count="r (d_in + d_out)",
        on_experts=EXPERT_PARAMETERS,
    )
)
class RsLora(Lora):
    def scaling(self, settings: Settings) -> float:
        return settings.alpha / math.sqrt(settings.rank)


@register_peft(RsLora)
class RsLoraWords(LoraWords):
    root_scaled = True

    def entries(self, settings: Settings) -> dict[str, Any]:
        return super().entries(settings) | {"use_rslora": True}

    def claims(self, described: Entries) -> bool:
        plain = described.get("init_lora_weights", True) in PLAIN_STARTS and not described.get("use_dora")
        return super().claims(described) and plain and bool(described.get("use_rslora"))
