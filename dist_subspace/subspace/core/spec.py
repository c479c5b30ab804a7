"""A method's identity card, and the settings that one layer's part is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_subspace.options import Option
from dist_subspace.subspace.core.constraints import Constraint


@dataclass(frozen=True)
class MethodInfo:
    """The identity card of a method (docs/methods.md, "Defaults of a method").

    statistic: what of the frozen matrix is computed at set-up (`none`, `row norms`, `top-r SVD`, `full SVD`, `QR`).
    constraints: the MPC constraints it can have; constraint: its own default; refusals: why it cannot have one; notices: of each.
    identity: whether the model computes what its base computes before the first step.
    capped: an unset rank is cut to what the smallest target can have, instead of being refused.
    peft_type: PEFT's name, where the adapter's own files are files that PEFT reads; set by the method's words (`peft_words.py`).
    count: trained parameters of a layer, as a formula. uses_targets: whether `target_modules` can choose among the sites.
    """

    name: str
    category: str
    reference: str
    summary: str
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


@dataclass(frozen=True)
class Settings:
    """What one layer's method is built from: resolved values, nothing left open."""

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
