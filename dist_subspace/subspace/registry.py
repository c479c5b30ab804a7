"""The methods by name. A new one is a file in this folder that registers a subclass of `SubspaceLinear`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from dist_subspace.errors import unknown_name
from dist_subspace.subspace.method import MethodInfo, SubspaceLinear

M = TypeVar("M", bound=type[SubspaceLinear])

_METHODS: dict[str, type[SubspaceLinear]] = {}


def register(info: MethodInfo) -> Callable[[M], M]:
    """Class decorator: make the class the method called `info.name`."""

    def add(cls: M) -> M:
        cls.info = info
        _METHODS[info.name] = cls
        return cls

    return add


def method_class(name: str) -> type[SubspaceLinear]:
    methods()
    if name not in _METHODS:
        raise unknown_name("subspace.method", name, _METHODS)
    return _METHODS[name]


def methods() -> dict[str, MethodInfo]:
    """Every registered method's identity card, by name."""
    package = importlib.import_module("dist_subspace.subspace")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return {name: cls.info for name, cls in _METHODS.items()}
