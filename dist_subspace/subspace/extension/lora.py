"""LoRA (arXiv 2106.09685): `y = W x + γ B (A D(x))`, `γ = α / r`, `D` dropout on the adapter's branch.

`A (r, d_in)` Kaiming-uniform with a = √5, that is U(-1/√d_in, 1/√d_in); `B (d_out, r)` zero: identity at the start. With
`init: loftq` both start at a fit of the base's rounding error (`loftq.py`), which is meant not to be the identity.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.options import choice, number, whole
from dist_subspace.subspace.blocks.loftq import LoftqLinear
from dist_subspace.subspace.blocks.low_rank import LowRankLinear, LowRankPair
from dist_subspace.subspace.core.learning_rate import Factors, LearningRate, by_alpha
from dist_subspace.subspace.core.peft_words import Entries, FromPeft, PeftWords, Shapes, by_pattern
from dist_subspace.subspace.core.rates import LearningRateRatio
from dist_subspace.subspace.core.registry import peft_words, register, register_peft
from dist_subspace.subspace.core.spec import EXPERT_PARAMETERS, MethodInfo, Settings

LORA_OPTIONS = {
    "init": choice("kaiming", "initial values of A; loftq: of A and B, on a quantised base", "gaussian", "loftq"),
    "iterations": whole(1, "rounds of quantisation and fit, for init: loftq"),
    "lr_ratio": number(1.0, "learning rate of B over that of A (LoRA+, arXiv 2402.12354)", above=0),
}


def lora_effect(settings: Factors) -> float:
    """Of A's rate, where B's is `lr_ratio` times as high: their product is what moves the update."""
    return by_alpha(settings) * math.sqrt(settings.options["lr_ratio"])


@register(
    MethodInfo(
        name="lora",
        category="extension",
        reference="2106.09685",
        summary="a low-rank matrix beside the frozen one: W + (α/r) B A",
        learning_rate=LearningRate(
            3e-3, 3e-3, 2e-4, "LLaMA-7B in QLoRA's paper", effect=lora_effect, effect_text="√(α lr_ratio)"
        ),
        uses_rank=True,
        rank=16,
        alpha_over_rank=2.0,
        uses_dropout=True,
        constraints=("mpc_o", "mpc_d", "mpc_n"),
        options=LORA_OPTIONS,
        count="r (d_in + d_out)",
        on_experts=EXPERT_PARAMETERS,
    )
)
class Lora(LoftqLinear, LearningRateRatio):
    left_factors = ("lora_B",)

    def initial_a(self, settings: Settings, generator: torch.Generator) -> Tensor:
        if settings.options["init"] == "gaussian":
            return torch.empty(settings.rank, self.in_features).normal_(std=1 / settings.rank, generator=generator)
        return super().initial_a(settings, generator)


# Values of PEFT's init_lora_weights that leave the base as it is.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
T = TypeVar("T")


@register_peft(Lora)
class LoraWords(PeftWords[LowRankPair]):
    """PEFT's LORA, of which single fields make other methods: their words inherit these.

    start: the value of `init_lora_weights` that makes it, whose base is not the base model alone; read_options: the method's
    own that PEFT's adapter means; root_scaled: whether the method's γ is α / √r.
    """

    peft_type = "LORA"
    has_patterns = True
    on_experts: ClassVar[bool] = True
    tensor_prefix = "lora_"
    suffixes: ClassVar[Mapping[str, str]] = {"lora_A.weight": "lora_A.weight", "lora_B.weight": "lora_B.weight"}
    defaults: ClassVar[Entries] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none"}
    more_entries = (
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "ensure_weight_tying",
        "target_parameters",
    )
    without_effect = (
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
    )
    start: ClassVar[str | None] = None
    read_options: ClassVar[Entries] = {}
    root_scaled: ClassVar[bool] = False

    def entries(self, settings: Settings) -> dict[str, Any]:
        return {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "bias": "none"}

    def agrees(self, part: LowRankPair) -> bool:
        """Not where the base holds another matrix than `Q(W)`: PEFT would add the file's B A to that one."""
        nonlinear = isinstance(part, LowRankLinear) and part.nonlinear
        return not nonlinear and not (isinstance(part, LoftqLinear) and part.rebases)

    def claims(self, described: Entries) -> bool:
        starts_alike = self.start is None or (
            described.get("init_lora_weights") == self.start and not described.get("use_dora")
        )
        return super().claims(described) and starts_alike

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        layers = self.by_layer(tensors)
        self._check_start(described)
        ranks = {
            name: held["lora_A.weight"].shape[-2] for name, held in layers.items()
        }  # of stacks the experts are first
        _check_ranks(ranks, by_pattern(described.get("rank_pattern"), described["r"], layers))
        alphas = by_pattern(described.get("alpha_pattern"), described["lora_alpha"], layers)
        if described.get("use_rslora") and not self.root_scaled:  # γ = α / √r, said by an α whose γ is α / r
            alphas = {name: alpha * math.sqrt(ranks[name]) for name, alpha in alphas.items()}
        rank, alpha = _most_common(ranks), _most_common(alphas)
        shapes: Shapes = {n: (h["lora_B.weight"].shape[-2], h["lora_A.weight"].shape[-1]) for n, h in layers.items()}
        return FromPeft(
            layers,
            shapes=shapes,
            rank=rank,
            alpha=float(alpha),
            dropout=float(described.get("lora_dropout") or 0.0),
            rank_pattern={name: other for name, other in ranks.items() if other != rank},
            alpha_pattern={name: float(other) for name, other in alphas.items() if other != alpha},
            options=self.read_options,
            made_from_base=None if self.start is None else f"init_lora_weights is {self.start!r}",
        )

    def _check_start(self, described: Entries) -> None:
        start = described.get("init_lora_weights", True)
        if start in PLAIN_STARTS or start == self.start:
            return
        if str(start).startswith("pissa_niter_"):
            raise UsageError(
                f"init_lora_weights is {start!r}, a start that PEFT draws at random and does not save, so that nobody can make "
                "it again, PEFT neither; accepted: pissa, or the adapter saved from its training as a plain LoRA (PEFT: "
                "save_pretrained with path_initial_model_for_weight_conversion)"
            )
        others = [words.start for words in peft_words() if isinstance(words, LoraWords) and words.start is not None]
        raise UsageError(
            f"init_lora_weights is {start!r}{' with use_dora' if start in others else ''}, whose base is not the base model "
            f"alone; accepted: {', '.join(map(str, (*PLAIN_STARTS, *others)))}"
        )


def _check_ranks(held: Mapping[str, int], expected: Mapping[str, int]) -> None:
    for name, rank in held.items():
        if rank != expected[name]:
            raise UsageError(
                f"the adapter holds rank {rank} for {name}, but its configuration says {expected[name]}; it is damaged"
            )


def _most_common(values: Mapping[str, T]) -> T:
    return Counter(values.values()).most_common(1)[0][0]
