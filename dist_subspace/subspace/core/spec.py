"""A method's identity card, what a user asks for, and the settings that one layer's part is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_subspace.options import Option
from dist_subspace.subspace.core.constraints import Constraint
from dist_subspace.subspace.core.learning_rate import LearningRate

# Whose a method's parameters on a stack of experts are: each expert's own, or one set that all of them share.
OWN, SHARED = EXPERT_PARAMETERS = ("own", "shared")


@dataclass(frozen=True)
class MethodInfo:
    """The identity card of a method (docs/methods.md, "Defaults of a method").

    learning_rate: at which it trains, by the width of the model and its own settings.
    statistic: what of the frozen matrix is computed at set-up (`none`, `row norms`, `top-r SVD`, `full SVD`, `QR`).
    constraints: the MPC constraints it can have; constraint: its own default; refusals: why it cannot have one; notices: of each.
    identity: whether the model computes what its base computes before the first step.
    capped: an unset rank is cut to what the smallest target can have, instead of being refused.
    peft_type: PEFT's name, where the adapter's own files are files that PEFT reads; set by the method's words (`peft_words.py`).
    count: trained parameters of a layer, as a formula. uses_targets: whether `target_modules` can choose among the sites.
    on_experts: of `EXPERT_PARAMETERS` those that it can have on the stack of a mixture's experts; none: it cannot be put there.
    """

    name: str
    category: str
    reference: str
    summary: str
    learning_rate: LearningRate
    targets: str | tuple[str, ...] = "all-linear"
    uses_rank: bool = False
    rank: int | None = None
    alpha_over_rank: float | None = None
    uses_alpha: bool = True  # of those that use a rank
    uses_dropout: bool = False
    mergeable: bool = True
    statistic: str = "none"
    constraints: tuple[str, ...] = ()
    constraint: str = "none"
    refusals: Mapping[str, str] = field(default_factory=dict)
    notices: Mapping[str, str] = field(default_factory=dict)
    identity: bool = True
    capped: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    peft_type: str | None = None
    count: str = ""
    uses_targets: bool = True
    on_experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class SubspaceConfig:
    """Which subspace is trained. Values left None are the method's own (docs/methods.md, "Defaults of a method").

    A rank, alpha or dropout given to a method that has none is accepted and said to be unused (`unused`). `rank_pattern` and
    `alpha_pattern` give single layers another rank or alpha, by name ending. `new_tokens` are ids of tokens that the base
    does not know (a tokenizer was extended by them): their embedding and head rows are trained beside the subspace.
    `target_parameters` names stacks of experts; given without `target_modules`, they are the only targets.
    `expert_parameters` says whether each expert of a stack has parameters of its `own`, or all of them one `shared` set.
    """

    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    target_parameters: Sequence[str] = ()
    expert_parameters: str = OWN
    constraint: str | None = None
    constraint_weight: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    new_tokens: Sequence[int] = ()
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON. A configuration without what there is for experts is what it was before there was
        any."""
        plain = asdict(self)
        if not plain["target_parameters"]:
            del plain["target_parameters"]
        if plain["expert_parameters"] == OWN:
            del plain["expert_parameters"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @classmethod
    def of_dict(cls, plain: Mapping[str, Any]) -> SubspaceConfig:
        """What `as_dict` gave, or more: keys that are no fields are left out."""
        return cls(**{key: value for key, value in plain.items() if key in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Settings:
    """What one layer's method is built from: resolved values, nothing left open."""

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    # Not in the text that a checkpoint's fingerprint is made of: the configuration has it there, where it is not the default.
    expert_parameters: str = field(default=OWN, repr=False)
