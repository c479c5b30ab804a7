"""One row for each leaf of the configuration's schema."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dist_subspace.config.schema import Config
from tests.keys.bench import Bench

SECTIONS = ("model", "subspace", "data", "training", "deepspeed", "checkpoint", "run")
TEST = "test_a_key_changes_the_run_as_the_reference_says"


@dataclass(frozen=True)
class Key:
    """name: dotted, as in a configuration. values: what it is changed to, shown in the table. changes: what the run does then,
    or `inert by design: ...`. reference: what that is compared with. check: the comparison."""

    name: str
    values: tuple[Any, ...]
    changes: str
    reference: str
    check: Callable[[Bench], None]

    def __str__(self) -> str:
        return self.name

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]

    @property
    def test(self) -> str:
        return f"tests/keys/test_{self.section}.py::{TEST}[{self.name}]"


def rows(section: str) -> list[Key]:
    """The rows of `tests/keys/<section>_keys.py`."""
    return list(importlib.import_module(f"tests.keys.{section}_keys").KEYS)


def leaves() -> list[str]:
    """The dotted name of every key that has a value: those of sections within sections and of listed entries too."""
    schema = Config.model_json_schema(mode="validation")
    return sorted(_leaves(schema, schema["$defs"], ""))


def _leaves(node: dict[str, Any], defined: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, entry in node["properties"].items():
        below = [defined[ref.rpartition("/")[2]] for ref in _references(entry)]
        if not (prefix == "" or "$ref" in entry):  # a section is no key; a list of entries is one beside its entries'
            yield f"{prefix}{name}"
        for section in below:
            yield from _leaves(section, defined, f"{prefix}{name}.")


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
