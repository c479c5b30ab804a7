"""VeRA (arXiv 2310.11454): `y = W x + l ⊙ (B (d ⊙ (A D(x))))`, A and B frozen, random, and shared by all layers.

`l (d_out)` zero: identity at the start; `d (r)` is `d_init`. One `A (r, max d_in)` and one `B (max d_out, r)`, uniform in
±√6/√fan_in, are drawn from `projection_seed` as PEFT draws them, and each layer takes its slice `A[:, :d_in]`, `B[:d_out]`.
No γ. They are part of the adapter's file unless `save_projection` is off, which trusts the seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.options import flag, number, whole
from dist_subspace.subspace.blocks.projections import Projections
from dist_subspace.subspace.core.files import FrozenInFile
from dist_subspace.subspace.core.forms import LowRankForm
from dist_subspace.subspace.core.learning_rate import LearningRate, by_option
from dist_subspace.subspace.core.peft_words import Entries, FromPeft, PeftWords, Shapes
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.shared import SharedAcrossLayers
from dist_subspace.subspace.core.spec import MethodInfo, Settings, SubspaceConfig

PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")  # as PEFT's files name A and B


@register(
    MethodInfo(
        name="vera",
        category="extension",
        reference="2310.11454",
        summary="two trained vectors around shared random projections: W + diag(l) B diag(d) A",
        learning_rate=LearningRate(
            1e-1, 6e-2, 4e-3, "the paper's on LLaMA-7B", effect=by_option("d_init"), effect_text="d_init"
        ),
        uses_rank=True,
        rank=256,
        uses_alpha=False,
        uses_dropout=True,
        capped=True,
        refusals=dict.fromkeys(("mpc_o", "mpc_d", "mpc_n"), "its A and B are frozen"),
        options={
            "d_init": number(0.1, "initial value of d"),
            "projection_seed": whole(0, "seed of A and B", least=0),
            "save_projection": flag(True, "keep A and B in the adapter's file"),
        },
        count="r + d_out",
    )
)
class Vera(LowRankForm, SharedAcrossLayers, FrozenInFile):
    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        if config.rank_pattern:
            raise UsageError(
                f"subspace.rank_pattern is {dict(config.rank_pattern)!r}, but the layers of vera share one A and one B; "
                "accepted: one rank for all"
            )
        return settings

    @classmethod
    def make_shared(cls, sites: Mapping[str, nn.Module], settings: Settings) -> Projections:
        generator = torch.Generator().manual_seed(settings.options["projection_seed"])
        widths = max(int(site.in_features) for site in sites.values())  # type: ignore[arg-type]
        heights = max(int(site.out_features) for site in sites.values())  # type: ignore[arg-type]
        a = uniform(settings.rank, widths, generator)
        b = uniform(heights, settings.rank, generator)
        device = next(next(iter(sites.values())).parameters()).device
        return Projections(a.to(device), b.to(device))

    def take_shared(self, shared: Projections | None) -> None:
        self.projections = shared or self.make_shared({"": self.base}, self.settings)  # type: ignore[dict-item]
        self.in_file = self.projections.claim() and bool(self.settings.options["save_projection"])

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.vera_lambda_d = nn.Parameter(torch.full((settings.rank,), float(settings.options["d_init"])))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features))

    def transform(self, x: Tensor) -> Tensor:
        dropout = self.settings.dropout if self.training else 0.0
        branch: Tensor = self.projections(self.base(x), x, self.vera_lambda_d, self.vera_lambda_b, dropout)
        return branch

    def factors(self) -> tuple[Tensor, Tensor]:
        """`diag(d) A (r, d_in)` and `diag(l) B (d_out, r)`, float32; A and B are whole."""
        a, b = self.projections.slices(self.in_features, self.out_features, torch.float32)
        return self.vera_lambda_d.float()[:, None] * a, self.vera_lambda_b.float()[:, None] * b

    def merged(self, weight: Tensor) -> Tensor:
        a, b = self.factors()
        return weight + (b @ a).to(weight.device)

    def low_rank_form(self) -> tuple[Tensor, Tensor]:
        a, b = self.factors()
        return a.detach(), b.detach()

    def frozen_in_file(self) -> dict[str, nn.Parameter]:
        if not self.in_file:
            return {}
        return dict(zip(PROJECTIONS, (self.projections.a, self.projections.b), strict=True))

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | {name: p.detach() for name, p in self.frozen_in_file().items()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        for name, parameter in self.frozen_in_file().items():
            parameter.data.copy_(tensors[name])


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """`(rows, columns)` uniform in ±√6/√columns."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))  # in the order in which PEFT rounds it
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


@register_peft(Vera)
class VeraWords(PeftWords[Vera]):
    peft_type = "VERA"
    tensor_prefix = "vera_"
    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("vera_lambda_b", "vera_lambda_d")}
    defaults: ClassVar[Entries] = {
        **{"r": 256, "d_initial": 0.1, "vera_dropout": 0.0, "projection_prng_key": 0, "save_projection": True},
    }
    without_effect = ("init_weights",)

    def entries(self, settings: Settings) -> dict[str, Any]:
        return {
            "r": settings.rank,
            "projection_prng_key": settings.options["projection_seed"],
            "save_projection": settings.options["save_projection"],
            "d_initial": settings.options["d_init"],
            "vera_dropout": settings.dropout,
            "bias": "none",
        }

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        projections = {key: tensors.pop(key) for key in PROJECTIONS if key in tensors}
        layers, whole = self.by_layer(tensors), len(projections) == 2
        if bool(described.get("save_projection", True)) != whole:
            raise UsageError("save_projection does not say whether the adapter holds its projections; it is damaged")
        shapes: Shapes = {name: (held["vera_lambda_b"].shape[0], None) for name, held in layers.items()}
        return FromPeft(
            layers,
            whole=projections,
            shapes=shapes,
            rank=int(described["r"]),
            dropout=float(described.get("vera_dropout") or 0.0),
            options={
                "d_init": float(described.get("d_initial", 0.1)),
                "projection_seed": int(described.get("projection_prng_key") or 0),
                "save_projection": whole,
            },
        )
