"""Options of methods (`subspace.options`) and storages (`model.storage_options`): default, what is accepted, a line of help."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_subspace.errors import UsageError


@dataclass(frozen=True)
class Option:
    """One option. `accepts` decides about a value, `accepted` says in words what it lets through."""

    default: Any
    help: str
    accepts: Callable[[Any], bool]
    accepted: str

    def check(self, name: str, value: Any, section: str = "subspace.options") -> None:
        """Raises UsageError for a value that is not accepted; the message names the option, the value, and what would be."""
        if not self.accepts(value):
            raise UsageError(f"{section}.{name} is {value!r}; accepted: {self.accepted}")


def choice(default: Any, help: str, *others: Any) -> Option:
    """One of a closed list; the default comes first in it."""
    values = (default, *others)
    return Option(
        default, help, lambda v: any(type(v) is type(w) and v == w for w in values), ", ".join(map(str, values))
    )


def flag(default: bool, help: str) -> Option:
    return choice(default, help, not default)


def number(
    default: float | None, help: str, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> Option:
    """A finite number within bounds; None where the default is None."""
    bounds = (("at least", least), ("above", above), ("at most", most))
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))

    def accepts(value: Any) -> bool:
        if value is None:
            return default is None
        return is_number(value) and math.isfinite(value) and value >= least and value > above and value <= most

    return Option(default, help, accepts, f"a number {words}".rstrip() + (" or null" if default is None else ""))


def whole(default: int | None, help: str, *, least: int = 1) -> Option:
    """A whole number of at least `least`; None where the default is None (then the method derives it)."""

    def accepts(value: Any) -> bool:
        return (value is None and default is None) or (
            isinstance(value, int) and not isinstance(value, bool) and value >= least
        )

    return Option(
        default, help, accepts, f"a whole number of at least {least}" + (" or null" if default is None else "")
    )


def steps(default: int | None, help: str, *, least: int = 0) -> Option:
    """A number of optimizer steps."""
    return whole(default, help, least=least)


def name_list(help: str) -> Option:
    """A list of module name endings, empty by default."""

    def accepts(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)

    return Option((), help, accepts, "a list of name endings")


def text(help: str) -> Option:
    """A text, None by default."""
    return Option(None, help, lambda v: v is None or isinstance(v, str), "a text or null")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
