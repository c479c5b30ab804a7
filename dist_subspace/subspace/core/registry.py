"""The methods by name, and what PEFT says of them. A new one is a file below this folder that registers a subclass of
`SubspacePart`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from dist_subspace.errors import unknown_name
from dist_subspace.subspace.core.constraints import constraint_options
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.peft_words import Entries, PeftWords
from dist_subspace.subspace.core.spec import MethodInfo

M = TypeVar("M", bound=type[SubspacePart])
W = TypeVar("W", bound=type[PeftWords[Any]])

_METHODS: dict[str, type[SubspacePart]] = {}


def register(info: MethodInfo) -> Callable[[M], M]:
    """Class decorator: make the class the method called `info.name`. Options of its constraints come by themselves."""

    def add(cls: M) -> M:
        cls.info = replace(info, options={**constraint_options(info.constraints), **info.options})
        cls.peft = None  # a base class may have words of its own
        _METHODS[info.name] = cls
        return cls

    return add


def register_peft(method: type[SubspacePart]) -> Callable[[W], W]:
    """Class decorator: make the class what PEFT says of the method."""

    def add(cls: W) -> W:
        words = cls()
        words.method = method.info.name
        method.peft = words
        if words.writes:
            method.info = replace(method.info, peft_type=words.peft_type)
        return cls

    return add


def method_class(name: str) -> type[SubspacePart]:
    methods()
    if name not in _METHODS:
        raise unknown_name("subspace.method", name, _METHODS)
    return _METHODS[name]


def methods() -> dict[str, MethodInfo]:
    """Every registered method's identity card, by name."""
    package = importlib.import_module("dist_subspace.subspace")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return {name: _METHODS[name].info for name in sorted(_METHODS)}


@cache
def peft_words() -> tuple[PeftWords[Any], ...]:
    """The words of every method that has some, in the order of the methods' names."""
    methods()
    return tuple(words for name in sorted(_METHODS) if (words := _METHODS[name].peft) is not None)


def words_reading(described: Entries) -> PeftWords[Any]:
    """The words of the method that an adapter of PEFT, of this adapter_config.json, is one of.

    Raises:
        UsageError: PEFT's method has none here.
    """
    kind, types = described.get("peft_type"), sorted({words.peft_type for words in peft_words()})
    if kind not in types:
        raise unknown_name("peft_type", kind, types)
    claiming = [words for words in peft_words() if words.claims(described)]
    return max(claiming, key=lambda words: len(type(words).__mro__))


@cache
def file_spelling() -> dict[str, str]:
    """Suffixes of parts -> as files spell them, of those that files spell otherwise."""
    return {ours: theirs for words in peft_words() for ours, theirs in words.spelling.items()}
