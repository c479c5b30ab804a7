"""LoRA-FA (arXiv 2308.03303): LoRA with A frozen at its random initial values, `y = W x + γ B (A D(x))`, `γ = α / r`.

B alone is trained, so that backward needs `A D(x)` (r numbers a token) and not x. A is part of the adapter's file, which is
PEFT's LoRA file. With `corrected_gradient` the gradient of B becomes `g_B (A Aᵀ)⁻¹ / γ²`, the step in B that changes W most
like the gradient of W itself (version 2 of the paper, and PEFT's optimizer for it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.options import flag
from dist_subspace.subspace.blocks.dropout import drop
from dist_subspace.subspace.blocks.low_rank import LowRankLinear, Up
from dist_subspace.subspace.core.factors import FrozenFactor
from dist_subspace.subspace.core.files import FrozenInFile
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.peft_words import Entries
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import MethodInfo, Settings, SubspaceConfig
from dist_subspace.subspace.extension.lora import LoraWords
from dist_subspace.torch_internals import TensorFunction


@register(
    MethodInfo(
        name="lora-fa",
        category="extension",
        reference="2308.03303",
        summary="LoRA whose A is frozen at its random start: W + (α/r) B A",
        learning_rate=LearningRate(5e-3, 5e-3, 4e-4, "twice LoRA's: B alone moves", effect=by_alpha, effect_text="√α"),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=("mpc_n",),
        refusals={"mpc_o": "its A is frozen", "mpc_d": "its A is frozen"},
        options={"corrected_gradient": flag(False, "multiply the gradient of B by (A A^T)^-1 / γ²")},
        count="r d_out",
    )
)
class LoraFa(LowRankLinear, FrozenInFile):
    lora_A: FrozenFactor  # type: ignore[assignment]

    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        if settings.options["corrected_gradient"] and settings.constraint is not None:
            raise UsageError(
                "subspace.options.corrected_gradient is True, but under constraint mpc_n the update is not linear in A; "
                "accepted there: False"
            )
        return settings

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.scale = self.scaling(settings)
        self.lora_A = FrozenFactor(self.initial_a(settings, generator).to(next(self.base.parameters()).device))
        self.lora_B = nn.Parameter(self.initial_b(settings, generator))
        self.register_buffer("correction", self._correction(), persistent=False)

    def _correction(self) -> Tensor | None:
        """`(A Aᵀ)⁻¹ / γ²`, float32 `(r, r)`; A is whole."""
        if not self.settings.options["corrected_gradient"]:
            return None
        a = self.down().double()
        inverse: Tensor = torch.linalg.pinv(a @ a.t(), hermitian=True)
        return (inverse / self.scale**2).float()

    def down(self) -> Tensor:
        return self.lora_A.matrix

    def transform(self, x: Tensor) -> Tensor:
        # The factor's rows lie along its own memory as `(tokens, r)`; `Up` wants `(r, tokens)`, and takes the view.
        hidden = self.lora_A(drop(x, self.settings.dropout if self.training else 0.0))
        hidden = hidden.reshape(-1, self.settings.rank).t()
        hidden = self.scale * (self.activation()(hidden) if self.nonlinear else hidden)
        b = self.lora_B if self.correction is None else _Corrected.apply(self.lora_B, self.correction)
        return Up.apply(self.base(x), hidden, b)

    def constrained_factors(self) -> tuple[None, None]:
        return None, None

    def frozen_in_file(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.lora_A.matrix}

    def file_tensors(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.frozen_in_file().items()} | super().file_tensors()

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self.lora_A.matrix.data.copy_(tensors["lora_A.weight"])
        self.correction = self._correction()


class _Corrected(TensorFunction):
    """B, unchanged; its gradient `(d_out, r)` times the correction."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, correction: Tensor) -> Tensor:
        ctx.save_for_backward(correction)
        return b.view_as(b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (correction,) = ctx.saved_tensors
        return g @ correction.to(g.dtype), None


@register_peft(LoraFa)
class LoraFaWords(LoraWords):
    on_experts = False

    def claims(self, described: Entries) -> bool:
        """PEFT trains it by an optimizer of its own, and its file does not tell it from any other LoRA."""
        return False
