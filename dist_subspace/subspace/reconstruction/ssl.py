"""SSL, scaling the left singular subspace (arXiv 2407.05417, eq. 10 with D2 = I): `y = W (s ⊙ x) + b`.

`s (d_in)` one at the start, held as the deviation `δ = s - 1`. The paper writes weights as (inputs, outputs), so its left
singular vectors belong to the inputs here. The frozen matrix is never edited, whatever its storage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.families.projections import KEY_VALUE_UP
from dist_subspace.subspace.blocks.scaling import Scale, ScalingLinear
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import EXPERT_PARAMETERS, MethodInfo, Settings


@register(
    MethodInfo(
        name="ssl",
        category="reconstruction, mode 2",
        reference="2407.05417",
        summary="each input feature scaled: W diag(s)",
        learning_rate=LearningRate(1e-1, 5e-2, 3e-3, "as (IA)³'s"),
        targets=KEY_VALUE_UP,
        count="d_in",
        on_experts=EXPERT_PARAMETERS,
    )
)
class Ssl(ScalingLinear):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.ssl_s = nn.Parameter(torch.zeros(self.in_features))

    def transform(self, x: Tensor) -> Tensor:
        return self.base(Scale.apply(x, self.ssl_s))

    def merged(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.ssl_s.float().to(weight.device))

    def scaling_form(self) -> tuple[Tensor | None, Tensor | None]:
        return 1 + self.ssl_s.detach().float(), None
