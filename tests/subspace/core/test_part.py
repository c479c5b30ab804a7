"""What a method is: a base of few methods, and classes for what only some have."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from dist_subspace.subspace import SubspaceLinear, SubspacePart, method_class, methods
from dist_subspace.subspace.core import part as contract

ROW = re.compile(r"^    (?:(\w+\.py) +| +)([A-Z]\w+) +(\S.*(?:\n {30,}\S.*)*)$", re.MULTILINE)


def described() -> dict[str, tuple[str, set[str], int]]:
    """The table in part.py: protocol -> its file, the methods that it names, and how many further rows it refers to."""
    found: dict[str, tuple[str, set[str], int]] = {}
    file = ""
    for named, protocol, text in ROW.findall(contract.__doc__ or ""):
        file = named or file
        words = set(re.findall(r"[\w-]+", text.partition(":")[2]))
        following = re.search(r"those of the next (\w+)", text)
        count = {"one": 1, "two": 2, "three": 3}[following[1]] if following else 0
        found[protocol] = file, words & methods().keys(), count
    return found


def own_methods(kind: type) -> set[str]:
    """What a class says itself; its parts that torch asks for included."""
    kinds = (classmethod, staticmethod, property)
    return {name for name, value in vars(kind).items() if inspect.isfunction(value) or isinstance(value, kinds)}


def test_the_base_of_all_parts_has_at_most_ten_methods() -> None:
    inherited = [kind for kind in SubspacePart.__mro__ if kind.__module__.startswith("dist_subspace.")]
    assert len(set().union(*map(own_methods, inherited))) <= 10


def test_a_linear_part_says_create_transform_and_merged() -> None:
    assert {"create", "transform", "merged"} <= own_methods(SubspaceLinear)
    assert len(own_methods(SubspaceLinear)) <= 12


def test_the_table_names_every_class_that_a_method_may_inherit() -> None:
    table = described()
    assert len(table) > 20
    known = {
        kind.__name__
        for file in {row[0] for row in table.values()} - {"peft_words.py"}
        for kind in vars(importlib.import_module(f"{contract.__package__}.{file.removesuffix('.py')}")).values()
        if inspect.isclass(kind)
        and issubclass(kind, SubspacePart)
        and kind.__module__.endswith(file.removesuffix(".py"))
    }
    assert known == table.keys() - {"PeftWords"}


@pytest.mark.parametrize("protocol", [name for name in described() if name not in ("MergesIntoNorm", "PeftWords")])
def test_the_table_names_the_methods_that_have_each(protocol: str) -> None:
    table, names = described(), list(described())
    file, named, following = table[protocol]
    for other in names[names.index(protocol) + 1 :][:following]:
        named = named | table[other][1]
    kind = getattr(importlib.import_module(f"{contract.__package__}.{file.removesuffix('.py')}"), protocol)
    assert named == {name for name in methods() if issubclass(method_class(name), kind)}


def left_open(kind: type, name: str) -> bool:
    """Whether the class has of a method only what ends in `raise NotImplementedError`."""
    held = inspect.getattr_static(kind, name)
    function = getattr(held, "__func__", getattr(held, "fget", held))
    return inspect.isfunction(function) and "NotImplementedError" in function.__code__.co_names


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_method_fills_what_it_inherits(method: str) -> None:
    kind = method_class(method)
    ours = {name for base in kind.__mro__ if base.__module__.startswith("dist_subspace.") for name in own_methods(base)}
    assert [name for name in sorted(ours) if left_open(kind, name)] == []


def test_what_a_method_does_not_fill_is_found() -> None:
    assert left_open(SubspaceLinear, "transform") and left_open(SubspacePart, "build")
    assert not left_open(SubspaceLinear, "merged_bias")
