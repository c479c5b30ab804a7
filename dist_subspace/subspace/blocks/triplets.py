"""Updates made of triplets (a row of A, an entry of E, a column of B) that a schedule takes away or adds: the ground that
AdaLoRA and FlexLoRA share. All triplets there will ever be are allocated at attach."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.subspace.blocks.low_rank import LowRankLinear
from dist_subspace.subspace.core.spec import Settings, SubspaceConfig

SPREAD = 0.02  # standard deviation of new vectors


class TripletLinear(LowRankLinear):
    """`y = W x + γ B (E ⊙ (A D(x)))` with `E (r,)` zero, `A (r, d_in)` and `B (d_out, r)` ~ N(0, 0.02²)."""

    # The option that says how many triplets are allocated, at most a layer's smaller side; unset, `rows_for` derives it.
    rows_option: ClassVar[str]

    @classmethod
    def rows_for(cls, rank: int) -> int:
        raise TypeError(f"{cls.__name__} does not say how many triplets it allocates")

    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        given = settings.options[cls.rows_option]
        rows = cls.rows_for(settings.rank) if given is None else given
        if rows < settings.rank:
            raise UsageError(
                f"subspace.options.{cls.rows_option} is {rows}; accepted: at least {settings.rank}, which is subspace.rank"
            )
        return replace(settings, options={**settings.options, cls.rows_option: rows})

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        rows = min(settings.options[self.rows_option], self.in_features, self.out_features)
        self.scale = self.scaling(settings)
        self.lora_A = nn.Parameter(new_vectors(rows, self.in_features, generator))
        self.lora_B = nn.Parameter(new_vectors(self.out_features, rows, generator))
        self.lora_E = nn.Parameter(torch.zeros(rows))

    def core(self) -> Tensor:
        return self.lora_E


def new_vectors(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.empty(rows, columns).normal_(std=SPREAD, generator=generator)
