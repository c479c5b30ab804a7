"""What a user asks for (`SubspaceConfig`), and what it comes to once the method's own defaults are filled in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.subspace.method import MethodInfo, Settings, SubspaceLinear
from dist_subspace.subspace.registry import method_class

CONSTRAINTS = ("none", "mpc_o", "mpc_d", "mpc_n")


@dataclass(frozen=True)
class SubspaceConfig:
    """Which subspace is trained. Values left None are the method's own (methods.md 14.1).

    A rank, alpha or dropout given to a method that has none is accepted and said to be unused (`unused`).
    """

    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    constraint: str | None = None
    constraint_weight: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        plain = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


@dataclass(frozen=True)
class Resolved:
    """A configuration with nothing left open: the class, the settings of each layer, the targets, and what was not used."""

    method: type[SubspaceLinear]
    settings: Settings
    targets: str | Sequence[str]
    config: SubspaceConfig
    unused: tuple[str, ...]

    @property
    def info(self) -> MethodInfo:
        return self.method.info


def resolve(config: SubspaceConfig) -> Resolved:
    """Fill in the method's defaults.

    Raises:
        UsageError: for an unknown method, option or constraint, or a value out of range; the field is named.
    """
    method = method_class(config.method)
    info = method.info
    _check_ranges(config, info)
    rank = (config.rank or info.rank or 0) if info.uses_rank else 0
    alpha = config.alpha if config.alpha is not None else rank * (info.alpha_over_rank or 0.0)
    options = _options(config.options, info)
    settings = Settings(rank, float(alpha), config.dropout if info.uses_dropout else 0.0, options)
    targets = info.targets if config.target_modules is None else config.target_modules
    if isinstance(targets, Sequence) and not targets:
        raise UsageError("subspace.target_modules is empty; accepted: all-linear, a list of name endings, or a pattern")
    return Resolved(method, settings, targets, config, _unused(config, info))


def _check_ranges(config: SubspaceConfig, info: MethodInfo) -> None:
    whole = isinstance(config.rank, int) and not isinstance(config.rank, bool)
    if info.uses_rank and config.rank is not None and (not whole or config.rank < 1):
        raise UsageError(f"subspace.rank is {config.rank!r}; accepted: a whole number of at least 1")
    if config.alpha is not None and not (_is_number(config.alpha) and math.isfinite(config.alpha) and config.alpha > 0):
        raise UsageError(f"subspace.alpha is {config.alpha!r}; accepted: a number above 0")
    if not _is_number(config.dropout):
        raise UsageError(f"subspace.dropout is {config.dropout!r}; accepted: from 0 up to, but not including, 1")
    if not 0 <= config.dropout < 1:
        raise UsageError(f"subspace.dropout is {config.dropout!r}; accepted: from 0 up to, but not including, 1")
    constraint = config.constraint or "none"
    if constraint not in CONSTRAINTS:
        raise unknown_name("subspace.constraint", constraint, CONSTRAINTS)
    if constraint != "none" and constraint not in info.constraints:
        accepted = ", ".join(("none", *info.constraints))
        raise UsageError(f"subspace.constraint is {constraint!r}; method {info.name} accepts: {accepted}")


def _options(given: Mapping[str, Any], info: MethodInfo) -> dict[str, Any]:
    for name, value in given.items():
        if name not in info.options:
            if not info.options:
                raise UsageError(f"subspace.options has {name!r}, but method {info.name} has no options")
            raise unknown_name(f"an option of method {info.name}", name, info.options)
        _check_option(f"subspace.options.{name}", value, info.options[name].default, info.options[name].accepted)
    return {name: given.get(name, option.default) for name, option in info.options.items()}


def _check_option(field_name: str, value: Any, default: Any, accepted: tuple[Any, ...] | None) -> None:
    if accepted is not None and value not in accepted:
        raise UsageError(f"{field_name} is {value!r}; accepted: {', '.join(map(str, accepted))}")
    if accepted is None and _is_number(default) and not (_is_number(value) and value > 0):
        raise UsageError(f"{field_name} is {value!r}; accepted: a number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unused(config: SubspaceConfig, info: MethodInfo) -> tuple[str, ...]:
    given = []
    if not info.uses_rank:
        given += [name for name in ("rank", "alpha") if getattr(config, name) is not None]
    if not info.uses_dropout and config.dropout:
        given.append("dropout")
    return tuple(given)
