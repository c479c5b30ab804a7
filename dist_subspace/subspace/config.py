"""What a user's configuration comes to once the method's own defaults are filled in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.options import is_number
from dist_subspace.subspace.beside.new_tokens import check_ids
from dist_subspace.subspace.core.constraints import CONSTRAINTS, Constraint
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.registry import method_class
from dist_subspace.subspace.core.spec import EXPERT_PARAMETERS, OWN, MethodInfo, Settings, SubspaceConfig


@dataclass(frozen=True)
class Resolved:
    """A configuration with nothing left open: the class, the settings of each layer, the targets, and what was not used."""

    method: type[SubspacePart]
    settings: Settings
    targets: str | Sequence[str]
    config: SubspaceConfig
    unused: tuple[str, ...]

    @property
    def info(self) -> MethodInfo:
        return self.method.info

    @property
    def notice(self) -> str | None:
        """What who chose this constraint for this method should know; None where there is nothing to say."""
        kind = self.settings.constraint.kind if self.settings.constraint else "none"
        return f"{kind} on {self.info.name}: {self.info.notices[kind]}" if kind in self.info.notices else None


def resolve(config: SubspaceConfig) -> Resolved:
    """Fill in the method's defaults.

    Raises:
        UsageError: for an unknown method, option or constraint, or a value out of range; the field is named.
    """
    method = method_class(config.method)
    info = method.info
    _check_ranges(config, info)
    check_ids(config.new_tokens)
    settings = layer_settings(config, method, config.rank, config.alpha)
    for ending in (*config.rank_pattern, *config.alpha_pattern):
        layer_settings(
            config, method, config.rank_pattern.get(ending, config.rank), config.alpha_pattern.get(ending, config.alpha)
        )
    targets = info.targets if config.target_modules is None else config.target_modules
    if isinstance(targets, Sequence) and not targets:
        raise UsageError("subspace.target_modules is empty; accepted: all-linear, a list of name endings, or a pattern")
    return Resolved(method, settings, targets, config, _unused(config, info))


def layer_settings(
    config: SubspaceConfig, method: type[SubspacePart], rank: int | None, alpha: float | None
) -> Settings:
    """The settings of a layer with its own rank and alpha (None: the method's)."""
    info = method.info
    _check_rank_and_alpha(rank, alpha, info)
    used = (rank or info.rank or 0) if info.uses_rank else 0
    settings = Settings(
        rank=used,
        alpha=float(alpha if alpha is not None else used * (info.alpha_over_rank or 0.0)),
        dropout=config.dropout if info.uses_dropout else 0.0,
        options=_options(config.options, info),
        constraint=_constraint(config, info),
        expert_parameters=config.expert_parameters,
    )
    return method.complete(settings, config)


def with_capped_rank(settings: Settings, info: MethodInfo, config: SubspaceConfig, bound: int) -> Settings:
    """The settings of a layer whose rank is at most `bound`: an unset rank may be cut to it (`info.capped`)."""
    if info.capped and config.rank is None and settings.rank > bound:
        return replace(settings, rank=bound)
    return settings


def _check_ranges(config: SubspaceConfig, info: MethodInfo) -> None:
    if not is_number(config.dropout) or not 0 <= config.dropout < 1:
        raise UsageError(f"subspace.dropout is {config.dropout!r}; accepted: from 0 up to, but not including, 1")
    if config.expert_parameters not in EXPERT_PARAMETERS:
        raise unknown_name("subspace.expert_parameters", config.expert_parameters, EXPERT_PARAMETERS)
    if config.expert_parameters != OWN and not config.target_parameters:
        raise UsageError(
            f"subspace.expert_parameters is {config.expert_parameters!r}, but no experts are named; accepted: {OWN}, or with "
            "subspace.target_parameters"
        )
    weight = config.constraint_weight
    if not is_number(weight) or not (math.isfinite(weight) and weight >= 0):
        raise UsageError(f"subspace.constraint_weight is {weight!r}; accepted: a number of at least 0")
    constraint = config.constraint or "none"
    if constraint not in CONSTRAINTS:
        raise unknown_name("subspace.constraint", constraint, CONSTRAINTS)
    if constraint != "none" and constraint not in info.constraints:
        accepted = ", ".join(("none", *info.constraints))
        reason = info.refusals.get(constraint, "it has no pair of trained low-rank factors")
        raise UsageError(
            f"subspace.constraint is {constraint!r}, which method {info.name} cannot have: {reason}; accepted: {accepted}"
        )


def _check_rank_and_alpha(rank: int | None, alpha: float | None, info: MethodInfo) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if info.uses_rank and rank is not None and (not whole or rank < 1):
        raise UsageError(f"subspace.rank is {rank!r}; accepted: a whole number of at least 1")
    if alpha is not None and not (is_number(alpha) and math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"subspace.alpha is {alpha!r}; accepted: a number above 0")


def _constraint(config: SubspaceConfig, info: MethodInfo) -> Constraint | None:
    kind = info.constraint if config.constraint is None else config.constraint
    if kind == "none":
        return None
    options = _options(config.options, info)
    return Constraint(kind, config.constraint_weight, options.get("power", 2), options.get("reduction", "mean"))


def _options(given: Mapping[str, Any], info: MethodInfo) -> dict[str, Any]:
    for name, value in given.items():
        if name not in info.options:
            if not info.options:
                raise UsageError(f"subspace.options has {name!r}, but method {info.name} has no options")
            raise unknown_name(f"an option of method {info.name}", name, info.options)
        info.options[name].check(name, value)
    return {name: given.get(name, option.default) for name, option in info.options.items()}


def _unused(config: SubspaceConfig, info: MethodInfo) -> tuple[str, ...]:
    given = []
    if not info.uses_rank:
        given += [name for name in ("rank", "rank_pattern") if getattr(config, name)]
    if not (info.uses_rank and info.uses_alpha):
        given += [name for name in ("alpha", "alpha_pattern") if getattr(config, name)]
    if not info.uses_dropout and config.dropout:
        given.append("dropout")
    if not info.uses_targets and config.target_modules is not None:
        given.append("target_modules")
    return tuple(given)
