"""DoRA (arXiv 2402.09353): `y = (m / n) ⊙ (W x + γ B A x)`, `n_i = ‖W_i + γ B_i A‖`, `γ = α / r`.

A and B start as LoRA's, the magnitudes `m (d_out)` as the row norms of W, and are held as deviations from them: identity at
the start. `n² = ‖W_i‖² + 2γ B_i (W Aᵀ)_i + γ² B_i A Aᵀ B_iᵀ` needs no dense matrix: A's rows travel as r more tokens through
the one product `W x`. As published, n is a constant in backward (`differentiate_norm`: it is not), and with dropout
`y = W x + (m/n - 1) ⊙ W D(x) + (m/n) ⊙ γ B A D(x)`, which doubles the tokens of the product. The bias is not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dist_subspace.options import flag
from dist_subspace.subspace.blocks.dropout import Dropout
from dist_subspace.subspace.blocks.low_rank import LowRankPair
from dist_subspace.subspace.blocks.magnitude import SMALLEST, ScaledUpdate, Stack, deviation
from dist_subspace.subspace.core.learning_rate import LearningRate, by_alpha
from dist_subspace.subspace.core.operator import Weight
from dist_subspace.subspace.core.peft_words import Entries, FromPeft
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import OWN, MethodInfo, Settings
from dist_subspace.subspace.core.statistic import SetupStatistic
from dist_subspace.subspace.extension.lora import LoraWords
from dist_subspace.torch_internals import version

ONLY_A = "it acts on A alone: the columns of B carry the update's lengths, beside trained magnitudes"


@register(
    MethodInfo(
        name="dora",
        category="combination",
        reference="2402.09353",
        summary="LoRA for the directions of W's rows, and a trained length for each: diag(m/n) (W + (α/r) B A)",
        learning_rate=LearningRate(
            3e-3, 3e-3, 2e-4, "LLaMA-7B in the method's repository", effect=by_alpha, effect_text="√α"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        statistic="row norms",
        constraints=("mpc_o", "mpc_d"),
        refusals={"mpc_n": "its norms are those of a linear update"},
        notices={"mpc_o": ONLY_A, "mpc_d": ONLY_A},
        options={"differentiate_norm": flag(False, "let gradients flow through n, a constant as published")},
        count="r (d_in + d_out) + d_out",
        on_experts=(OWN,),
    )
)
class Dora(LowRankPair, SetupStatistic):
    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        self.lora_magnitude_vector = nn.Parameter(torch.zeros(self.out_features))
        # d_out numbers, so every rank keeps them; as bytes, because an engine casts floats to its own type.
        self.register_buffer("norm_bytes", torch.zeros(4 * self.out_features, dtype=torch.int8), persistent=False)
        self._evaluated: tuple[Any, Tensor] | None = None

    def decompose(self, weight: Weight) -> dict[str, Tensor]:
        return {"row_norms": torch.linalg.vector_norm(weight.matrix, dim=1, dtype=torch.float64).float()}

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        self.norm_bytes = factors["row_norms"].float().contiguous().view(torch.int8)
        self._evaluated = None

    @property
    def row_norms(self) -> Tensor:
        """`‖W_i‖`, float32 `(d_out,)`."""
        return self.norm_bytes.view(torch.float32)

    def transform(self, x: Tensor) -> Tensor:
        drop = Dropout(self.settings.dropout if self.training else 0.0, x.reshape(-1, self.in_features))
        factors = (self.lora_A, self.lora_B)
        kept = self._evaluated
        if kept is not None and kept[0] == self._state(x) and not torch.is_grad_enabled():
            out = self.base(x.reshape(-1, self.in_features))
            return ScaledUpdate.apply(out, x, *factors, kept[1], self.scale, drop)
        through_norm = self.settings.options["differentiate_norm"]
        out = self.base(Stack.apply(x, self.lora_A, drop, through_norm))
        products = out[-self.settings.rank :].t()
        delta = deviation(
            self.lora_magnitude_vector,
            self.row_norms,
            products if through_norm else products.detach(),
            *factors,
            self.scale,
            through_norm,
        )
        self._evaluated = None if self.training or torch.is_grad_enabled() else (self._state(x), delta)
        return ScaledUpdate.apply(out, x, *factors, delta, self.scale, drop)

    def _state(self, x: Tensor) -> Any:
        """What the scale was made of: versions tell parameters that were loaded since (`load_state_dict`)."""
        return x.device, *(version(p) for p in (self.lora_A, self.lora_B, self.lora_magnitude_vector))

    def train(self, mode: bool = True) -> Self:
        """The scale is a function of the parameters alone: evaluation makes it once, until training goes on."""
        self._evaluated = None
        return super().train(mode)

    def merged(self, weight: Tensor) -> Tensor:
        changed = weight + self.delta().to(weight.device)
        base_norms, magnitude = self.row_norms.to(weight.device), self.lora_magnitude_vector.float().to(weight.device)
        n = torch.linalg.vector_norm(changed, dim=1).clamp(min=SMALLEST**0.5 * base_norms)
        n = n if self.settings.options["differentiate_norm"] else n.detach()
        ratio = torch.where(base_norms == 0, 1.0, (base_norms + magnitude) / torch.where(base_norms == 0, 1.0, n))
        return ratio[:, None] * changed

    def constrained_factors(self) -> tuple[Tensor, None]:
        return self.lora_A, None

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | {"lora_magnitude_vector": self.row_norms + self.lora_magnitude_vector.detach()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self.lora_magnitude_vector.data.copy_(tensors["lora_magnitude_vector"].to(self.row_norms) - self.row_norms)
        self._evaluated = None


@register_peft(Dora)
class DoraWords(LoraWords):
    on_experts = False
    suffixes: ClassVar[Mapping[str, str]] = {
        **LoraWords.suffixes,
        "lora_magnitude_vector": "lora_magnitude_vector",
        "lora_magnitude_vector.weight": "lora_magnitude_vector",
    }
    # PEFT reads both names and writes the shorter, which transformers' reader of adapters does not know. Our files of before
    # have the shorter.
    spelling: ClassVar[Mapping[str, str]] = {"lora_magnitude_vector": "lora_magnitude_vector.weight"}

    def entries(self, settings: Settings) -> dict[str, Any]:
        return super().entries(settings) | {"use_dora": True}

    def claims(self, described: Entries) -> bool:
        return super().claims(described) and bool(described.get("use_dora"))

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        adapter = super().read(described, tensors)
        for held in adapter.layers.values():
            held["lora_magnitude_vector"] = held["lora_magnitude_vector"].flatten()
        return adapter
