"""The two forms in which PEFT reads any method that has them: a LoRA, and scalings (IA3). Local."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_subspace.interchange.peft.forms import Forms, Pair
from dist_subspace.subspace.core.peft_words import PREFIX, Entries

Written = tuple[dict[str, Any], dict[str, Tensor]]  # entries of adapter_config.json, and tensors

# Entries of adapter_config.json that PEFT reads for every kind of adapter on layers.
OF_EVERY_KIND = {
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "inference_mode",
    "target_modules",
    "modules_to_save",
}


def lora_files(pairs: Mapping[str, Pair], described: Entries) -> Written:
    """LoRA with γ = 1 in every layer: for PEFT by patterns, for vLLM because `lora_alpha / r` is 1 and nothing else is read."""
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    rank = max(ranks.values())
    fewer = {name: other for name, other in ranks.items() if other != rank}
    entries = {
        **{"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none"},
        **{"use_rslora": False, "use_dora": False, "init_lora_weights": True},
        **{"rank_pattern": fewer, "alpha_pattern": dict(fewer), "fan_in_fan_out": _conv1d(described)},
    }
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    return entries, tensors


def _conv1d(described: Entries) -> bool:
    return bool(described["dist_subspace"].get("conv1d"))


def scaling_files(forms_by_layer: Mapping[str, Forms | None], described: Entries) -> Written:
    forms = {name: form for name, form in forms_by_layer.items() if form is not None}
    inputs = [name for name, form in forms.items() if form.input_scale is not None]
    pattern = ".*" if len(inputs) == len(forms) else "|".join(map(re.escape, inputs))
    entries = {
        **{"peft_type": "IA3", "feedforward_modules": pattern if inputs else [], "init_ia3_weights": True},
        "fan_in_fan_out": _conv1d(described),
    }
    tensors: dict[str, Tensor] = {}
    for name, form in forms.items():
        if form.input_scale is not None:
            tensors[f"{PREFIX}{name}.ia3_l"] = form.input_scale[None, :]
        elif form.output_scale is not None:
            tensors[f"{PREFIX}{name}.ia3_l"] = form.output_scale[:, None]
    return entries, tensors


def has_one_scale(described: Entries) -> bool:
    ranks, alphas = described.get("rank_pattern") or {}, described.get("alpha_pattern") or {}

    def scale(rank: float, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)

    if described["peft_type"] != "LORA" or (not ranks and not alphas):
        return True  # of AdaLoRA's files a pattern is no list of ranks; nor need a method have a rank
    r, alpha = float(described["r"]), float(described["lora_alpha"])
    others = {scale(ranks.get(name, r), alphas.get(name, alpha)) for name in {*ranks, *alphas}}
    return all(math.isclose(gamma, scale(r, alpha)) for gamma in others)
