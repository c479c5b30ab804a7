"""SSB, scaling both singular subspaces (arXiv 2407.05417, eq. 10): `y = l ⊙ (W (s ⊙ x)) + b`.

`l (d_out)` and `s (d_in)` one at the start, held as deviations. Only `(l, s)` up to `(c l, s / c)` matters: harmless, and
left free. The bias is not scaled unless `scale_bias` is set.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.families.projections import KEY_VALUE_UP
from dist_subspace.options import flag
from dist_subspace.subspace.blocks.scaling import Scale, ScalingLinear
from dist_subspace.subspace.core.bias import ScalesBias
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import EXPERT_PARAMETERS, MethodInfo, Settings


@register(
    MethodInfo(
        name="ssb",
        category="reconstruction, mode 2",
        reference="2407.05417",
        summary="each input and each output feature scaled: diag(l) W diag(s)",
        learning_rate=LearningRate(1e-1, 5e-2, 3e-3, "as (IA)³'s"),
        targets=KEY_VALUE_UP,
        options={"scale_bias": flag(False, "scale the bias by l too")},
        count="d_in + d_out",
        on_experts=EXPERT_PARAMETERS,
    )
)
class Ssb(ScalingLinear, ScalesBias):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.ssb_s = nn.Parameter(torch.zeros(self.in_features))
        self.ssb_l = nn.Parameter(torch.zeros(self.out_features))

    def transform(self, x: Tensor) -> Tensor:
        return Scale.apply(self.base(Scale.apply(x, self.ssb_s)), self.ssb_l)

    def scaled_bias(self, bias: Tensor) -> Tensor:
        return bias * (1 + self.ssb_l) if self.settings.options["scale_bias"] else bias

    def merged(self, weight: Tensor) -> Tensor:
        rows = 1 + self.ssb_l.float().to(weight.device)
        columns = 1 + self.ssb_s.float().to(weight.device)
        return rows[:, None] * weight * columns

    def scaling_form(self) -> tuple[Tensor | None, Tensor | None]:
        return 1 + self.ssb_s.detach().float(), 1 + self.ssb_l.detach().float()
