"""The configuration's keys as a person reads them: one key explained, and a recipe with every key and what it means."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dist_subspace.config import config_schema
from dist_subspace.errors import UsageError
from dist_subspace.report.tables import value_text

REQUIRED = "required"
_WIDTH = 110  # columns of a recipe's comments
_EXAMPLES = {"model.path": "meta-llama/Llama-3.1-8B", "data.train": "train.jsonl"}  # of what has no default


@dataclass(frozen=True)
class KeyFacts:
    """One key: its dotted name, what it takes and its default as YAML has them, and what it does. A section has neither."""

    name: str
    accepted: str
    default: str
    meaning: str

    def text(self) -> str:
        """For a terminal."""
        rows = [("accepted", self.accepted), ("default", self.default), ("meaning", self.meaning)]
        return "\n".join([self.name, *(f"  {name:<10}{text}" for name, text in rows if text)])


def key_facts(schema: Mapping[str, Any], quote: str = "") -> list[KeyFacts]:
    """Every key of a JSON schema of the configuration, in its order, each section within a section by its keys.

    Arguments:
        quote: what stands around each of the values that a key may take.
    """
    return list(_keys(schema, schema["$defs"], "", quote))


def explained(name: str) -> str:
    """What `dist-subspace schema KEY` prints: a key, or every key of a section.

    Raises:
        UsageError: there is none of that name; names the nearest.
    """
    facts = key_facts(config_schema())
    found = [key for key in facts if key.name == name or key.name.startswith(f"{name}.")]
    if not found:
        found = [
            key for key in facts if key.name.rpartition(".")[2] == name
        ]  # without its section, as people remember it
    if not found:
        names = [key.name for key in facts]
        near = difflib.get_close_matches(name, names + [key.rpartition(".")[2] for key in names], 3) or [names[0]]
        raise UsageError(f"KEY is {name!r}, which is no key of the configuration; the nearest: {', '.join(near)}")
    return "\n\n".join(key.text() for key in found)


def recipe_text() -> str:
    """A YAML configuration with every key: those that must be given with an example, the others with their defaults, commented
    out; above each what it means and what it takes."""
    schema = config_schema()
    lines = ["# Every key of a configuration. What is commented out has its default, and need not be given."]
    for section, entry in schema["properties"].items():
        lines += ["", f"# {entry.get('description', '')}", f"{section}:"]
        for key in key_facts(schema):
            head, _, rest = key.name.partition(".")
            if head == section and "." not in rest:
                lines += [*_comment(f"{key.meaning} ({key.accepted})"), _given(key, rest)]
    return "\n".join(lines) + "\n"


def _given(key: KeyFacts, name: str) -> str:
    if key.default != REQUIRED:
        return f"  # {name}: {key.default}"
    return f"  {name}: {_EXAMPLES.get(key.name, '')}".rstrip()


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  # ", subsequent_indent="  # ", break_on_hyphens=False)


def _keys(node: Mapping[str, Any], defined: Mapping[str, Any], prefix: str, quote: str) -> Iterator[KeyFacts]:
    required = node.get("required", ())
    for name, entry in node["properties"].items():
        if "$ref" in entry:
            yield from _keys(defined[entry["$ref"].rpartition("/")[2]], defined, f"{prefix}{name}.", quote)
            continue
        default = REQUIRED if name in required else yaml_text(entry.get("default"))
        yield KeyFacts(f"{prefix}{name}", _accepted(entry, quote), default, entry.get("description", ""))


def _accepted(node: Mapping[str, Any], quote: str) -> str:
    if "$ref" in node:
        return "a mapping"
    if "enum" in node:
        return ", ".join(f"{quote}{value}{quote}" for value in node["enum"])
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_accepted(one, quote) for one in node["anyOf"]))
    if "const" in node:
        return f"{quote}{node['const']}{quote}"
    kind = node.get("type", "any")
    if kind == "array":
        return f"list of {_accepted(node.get('items', {}), quote)}"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = " and ".join(f"{word} {value_text(node[key])}" for key, word in words.items() if key in node)
    names = {"integer": "whole number", "string": "text", "boolean": "true, false", "object": "mapping"}
    return f"{names.get(kind, kind)} {limits}".strip()


def yaml_text(value: Any) -> str:
    """A default as YAML has it."""
    return "{}" if value == {} else value_text(value)
