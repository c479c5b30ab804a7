"""The methods by name. A new one is a file below this folder that registers a subclass of `SubspacePart`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from dist_subspace.errors import unknown_name
from dist_subspace.subspace.core.constraints import constraint_options
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.spec import MethodInfo

M = TypeVar("M", bound=type[SubspacePart])

_METHODS: dict[str, type[SubspacePart]] = {}


def register(info: MethodInfo) -> Callable[[M], M]:
    """Class decorator: make the class the method called `info.name`. Options of its constraints come by themselves."""

    def add(cls: M) -> M:
        cls.info = replace(info, options={**constraint_options(info.constraints), **info.options})
        _METHODS[info.name] = cls
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
