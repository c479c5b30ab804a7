"""Spectral Adapter, rotational (arXiv 2405.13952): the r largest pairs of singular vectors, each side turned within its span.

    y = W x + U_r M (V_rᵀ x),   M = R(P) Σ_r R(Q)ᵀ - Σ_r,   R(P) = (I - K)(I + K)⁻¹,  K = (P - Pᵀ)/2

`P (r, r)` and `Q (r, r)` zero at the start; the singular values stay unless `gain` trains a factor on each (one at the start,
held as a deviation). The result depends on the signs of the vectors, so a rule settles them, and the file holds what was used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.options import flag
from dist_subspace.subspace.blocks.deviation import wide
from dist_subspace.subspace.blocks.spectral import REFUSALS, SpectralLinear, turned
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.spec import MethodInfo, Settings, SubspaceConfig


@register(
    MethodInfo(
        name="spectral-rotational",
        category="combination",
        reference="2405.13952",
        summary="the largest singular vectors rotated among themselves",
        learning_rate=LearningRate(3e-3, 3e-3, 1e-3, "falls as OFT's"),
        uses_rank=True,
        rank=16,
        uses_alpha=False,
        uses_dropout=True,
        statistic="top-r SVD",
        refusals=REFUSALS,
        options={"gain": flag(False, "train a factor on each singular value too")},
        count="2 r², with gain r more",
    )
)
class SpectralRotational(SpectralLinear):
    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        if settings.rank < 2:
            raise UsageError(
                f"subspace.rank is {settings.rank}, but method spectral-rotational turns vectors among one another; "
                "accepted: at least 2"
            )
        return settings

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.spectral_P = nn.Parameter(torch.zeros(settings.rank, settings.rank))
        self.spectral_Q = nn.Parameter(torch.zeros(settings.rank, settings.rank))
        if settings.options["gain"]:
            self.spectral_gain = nn.Parameter(torch.zeros(settings.rank))

    def core(self) -> Tensor:
        """M; with `R = I + T`: `T_P Σ' + Σ' T_Qᵀ + T_P Σ' T_Qᵀ + (Σ' - Σ)`, in which nothing cancels."""
        turn_p, turn_q = turned(torch.stack([self.spectral_P, self.spectral_Q]))
        sigma = wide(self.spectral_S)
        gained = sigma * wide(self.spectral_gain) if self.settings.options["gain"] else None
        values = sigma if gained is None else sigma + gained
        left = turn_p * values
        with torch.autocast(left.device.type, enabled=False):
            core: Tensor = left + values[:, None] * turn_q.t() + left @ turn_q.t()
        return core if gained is None else core + torch.diag(gained)

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = super().file_tensors()
        return tensors | {name: 1 + tensors[name].float() for name in ("spectral_gain",) if name in tensors}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        shifts = {name: tensors[name].float() - 1 for name in ("spectral_gain",) if name in tensors}
        super().load_file_tensors({**tensors, **shifts})
