"""AdaLoRA (arXiv 2303.10512): `y = W x + γ B (E ⊙ (A D(x)))`, `γ = α / r_init`, with a rank budget that shrinks.

`E (r_init)` zero: identity at the start; A and B ~ N(0, 0.02²), kept near orthogonal by MPC_o. From r_init triplets a layer down
to `rank` a layer on the average, E is zeroed at those of least importance in the whole model (schedules/cutting.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.options import number, whole
from dist_subspace.subspace.blocks.triplets import TripletLinear
from dist_subspace.subspace.core.constraints import constraint_options
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.peft_words import Entries, FromPeft, PeftWords, Shapes
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.schedule import Scheduled, phase_options
from dist_subspace.subspace.core.spec import MethodInfo, Settings, SubspaceConfig
from dist_subspace.subspace.extension.lora import LoraWords
from dist_subspace.subspace.schedules.cutting import DECISIONS, CuttingSchedule

CONSTRAINTS = ("mpc_o", "mpc_d", "mpc_n")
PEFT_EPSILON = 1e-5  # PEFT's γ is α / (r + 1e-5)


@register(
    MethodInfo(
        name="adalora",
        category="extension",
        reference="2303.10512",
        summary="triplets B diag(E) A whose number shrinks to a rank shared out over the model by importance",
        learning_rate=LearningRate(
            3e-2, 1e-2, 1e-3, "the middle of the paper's on DeBERTaV3-base", effect=by_alpha, effect_text="√α"
        ),
        uses_rank=True,
        rank=8,
        uses_dropout=True,
        constraints=CONSTRAINTS,
        constraint="mpc_o",
        options={
            **constraint_options(CONSTRAINTS, power=1),
            "init_rank": whole(
                None, "triplets a layer at the start, at most its smaller side; unset: 1.5 times the rank"
            ),
            **phase_options("cut", DECISIONS),
            "beta1": number(0.85, "smoothing of the importance", above=0, most=0.9999),
            "beta2": number(0.85, "smoothing of its uncertainty", above=0, most=0.9999),
        },
        count="init_rank (d_in + d_out + 1)",
    )
)
class AdaLora(TripletLinear, Scheduled):
    schedule_class = CuttingSchedule
    rows_option = "init_rank"

    @classmethod
    def rows_for(cls, rank: int) -> int:
        return math.ceil(1.5 * rank)

    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        settings = super().complete(settings, config)
        return replace(settings, alpha=settings.alpha or 2.0 * settings.options["init_rank"])

    def scaling(self, settings: Settings) -> float:
        return settings.alpha / int(settings.options["init_rank"])

    def file_tensors(self) -> dict[str, Tensor]:
        core = (self.lora_E.detach().double() * self._peft_factor()).float()
        return {"lora_A": self.lora_A.detach(), "lora_B": self.lora_B.detach(), "lora_E": core[:, None]}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.lora_A.data.copy_(tensors["lora_A"])
        self.lora_B.data.copy_(tensors["lora_B"])
        self.lora_E.data.copy_(tensors["lora_E"][:, 0].double() / self._peft_factor())

    def _peft_factor(self) -> float:
        """What the file's E is over ours, because PEFT's γ is smaller."""
        rows = len(self.lora_E)
        return (rows + PEFT_EPSILON) / rows


@register_peft(AdaLora)
class AdaLoraWords(PeftWords[AdaLora]):
    peft_type = "ADALORA"
    tensor_prefix = "lora_"
    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("lora_A", "lora_B", "lora_E")}
    defaults: ClassVar[Entries] = {
        **{"init_r": 12, "target_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "orth_reg_weight": 0.5},
    }
    more_entries = ("rank_pattern", "ensure_weight_tying")
    without_effect = (
        "beta1",
        "beta2",
        "tinit",
        "tfinal",
        "deltaT",
        "total_step",
        *LoraWords.without_effect,  # its configuration is a LoRA's with more
        "r",
        "use_rslora",
        "use_dora",
        "alpha_pattern",
        "init_lora_weights",
    )

    def agrees(self, part: AdaLora) -> bool:
        """PEFT makes all layers alike."""
        return not part.nonlinear and len(part.lora_E) == part.settings.options["init_rank"]

    def entries(self, settings: Settings) -> dict[str, Any]:
        """A schedule that is over: PEFT wants to know one, and would go on with it."""
        ended = {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        options = settings.options
        return {
            "init_r": options["init_rank"],
            "target_r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "bias": "none",
            "beta1": options["beta1"],
            "beta2": options["beta2"],
            "orth_reg_weight": 0.0 if settings.constraint is None else settings.constraint.weight,
            **ended,
        }

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        """Layers that the budget has shortened are filled up with triplets of zeros, at their old places."""
        layers = self.by_layer(tensors)
        rows, weight = int(described["init_r"]), float(described.get("orth_reg_weight") or 0.0)
        masks = {
            re.sub(r"\.lora_E(\..*)?$", "", key): kept for key, kept in (described.get("rank_pattern") or {}).items()
        }
        for key in masks:
            if key not in layers:
                raise UsageError(f"rank_pattern has {key!r}, which names no layer of the adapter")
        shapes: Shapes = {name: (held["lora_B"].shape[0], held["lora_A"].shape[1]) for name, held in layers.items()}
        return FromPeft(
            {name: _filled_up(name, held, rows, masks.get(name)) for name, held in layers.items()},
            shapes=shapes,
            rank=min(int(described.get("target_r") or rows), rows),
            alpha=float(described["lora_alpha"]),
            dropout=float(described.get("lora_dropout") or 0.0),
            constraint=None if weight > 0 else "none",
            constraint_weight=weight or 0.1,
            options={"init_rank": rows},
            outdated=("rank_pattern",),  # it is of the shortened tensors
        )


def _filled_up(name: str, held: Mapping[str, Tensor], rows: int, mask: list[bool] | None) -> dict[str, Tensor]:
    a, b, e = (held[key] for key in ("lora_A", "lora_B", "lora_E"))
    kept = a.shape[0]
    places = torch.arange(kept) if mask is None else torch.tensor(mask).nonzero().flatten()
    if kept == rows:
        return dict(held)
    if len(places) != kept or kept > rows:
        raise UsageError(
            f"the adapter holds rank {kept} for {name}, which its configuration does not say; it is damaged"
        )
    full_a, full_b, full_e = a.new_zeros(rows, a.shape[1]), b.new_zeros(b.shape[0], rows), e.new_zeros(rows, 1)
    full_a[places], full_b[:, places], full_e[places] = a, b, e
    return {"lora_A": full_a, "lora_B": full_b, "lora_E": full_e}
