"""LoRA-Dash (arXiv 2409.01035): `y = W x + γ B (A D(x)) + U_q (δ ⊙ (V_q D(x)))`, `γ = α / r`.

As LoRA at the start: `B (d_out, r)` zero, `A (r, d_in)` Kaiming-uniform; `δ (q,)` zero. After `warmup_steps` steps those of the
frozen matrix's own directions are chosen that the update has grown in most: with `W = U diag(σ) V` and `c_i = u_iᵀ (γ B A) v_i`,
the q largest rates `ρ_i = |c_i| / (σ_i + 1e-6)`. From then on δ is trained along them, beside A and B. `U_q (d_out, q)` and
`V_q (q, d_in)` are there from the start, as zeros, and always multiplied: the switch fills them in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_subspace.options import steps, whole
from dist_subspace.subspace.blocks.directions import DirectedUpdate
from dist_subspace.subspace.blocks.low_rank import LowRankLinear
from dist_subspace.subspace.blocks.svd import every
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.operator import Weight
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.schedules.switching import WARMUP, SwitchingPart, SwitchingSchedule

EPSILON = 1e-6


@register(
    MethodInfo(
        name="lora-dash",
        category="combination",
        reference="2409.01035",
        summary="LoRA, and from a step on the strengths of the frozen directions that it changed most",
        learning_rate=LearningRate(
            3e-3, 3e-3, 2e-4, "LLaMA-7B in the authors' repository", effect=by_alpha, effect_text="√α"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        statistic="full SVD",
        constraints=("mpc_o", "mpc_d"),
        refusals={"mpc_n": "its directions are chosen by a linear ΔW"},
        options={
            "directions": whole(8, "q: how many directions a layer gets, at most its smaller side"),
            "warmup_steps": steps(None, f"of plain LoRA; unset: {WARMUP}, at most a third of max_steps", least=1),
        },
        count="r (d_in + d_out) + q",
    )
)
class LoraDash(LowRankLinear, SwitchingPart):
    schedule_class = SwitchingSchedule
    late_factors = ("dash_delta",)
    directions = ("dash_U", "dash_V")
    dash_U: Tensor
    dash_V: Tensor

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        count = min(settings.options["directions"], self.in_features, self.out_features)
        device = next(self.base.parameters()).device
        self.dash_delta = nn.Parameter(torch.zeros(count))
        self.register_buffer("dash_U", torch.zeros(self.out_features, count, device=device))
        self.register_buffer("dash_V", torch.zeros(count, self.in_features, device=device))

    def decompose(self, weight: Weight) -> dict[str, Tensor]:
        triplets = every(weight.matrix)
        rates = self.coefficients(triplets.u, triplets.v).abs() / (triplets.s + EPSILON)
        chosen = rates.sort(descending=True, stable=True).indices[: len(self.dash_delta)]
        return {"dash_U": triplets.u[:, chosen].contiguous(), "dash_V": triplets.v[chosen].contiguous()}

    def coefficients(self, u: Tensor, v: Tensor) -> Tensor:
        """`c_i = u_iᵀ ΔW v_i` for `u (d_out, k)`, `v (k, d_in)`, without making ΔW."""
        a, b = self.lora_A.detach().to(v), self.lora_B.detach().to(u)
        return self.scale * ((u.t() @ b) * (v @ a.t())).sum(1)

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        for name in self.directions:
            self.get_buffer(name).copy_(factors[name])
        self.chosen = bool(self.dash_U.any())

    def transform(self, x: Tensor) -> Tensor:
        dropout = self.settings.dropout if self.training else 0.0
        z, fixed = self.base(x), (self.dash_U, self.dash_V)
        return DirectedUpdate.apply(z, x, self.lora_A, self.lora_B, self.dash_delta, *fixed, self.scale, dropout)

    def delta(self) -> Tensor:
        return super().delta() + self.dash_U.float() * self.dash_delta.float() @ self.dash_V.float()

    def low_rank_form(self) -> tuple[Tensor, Tensor]:
        strengths = self.dash_U.float() * self.dash_delta.detach().float()
        right = torch.cat([self.lora_A.detach().float(), self.dash_V.float()])
        return right, torch.cat([self.scale * self.lora_B.detach().float(), strengths], 1)

    def file_tensors(self) -> dict[str, Tensor]:
        return {**super().file_tensors(), "dash_U": self.dash_U, "dash_V": self.dash_V}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self.set_factors(tensors)
