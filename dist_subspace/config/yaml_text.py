"""YAML as people write it: safe, numbers like 2e-4 are numbers, 10:30:00 is text, a key given twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode

from dist_subspace.errors import UsageError

_FLOAT = re.compile(
    r"""^[-+]?(?: (?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
      | [0-9][0-9_]*[eE][-+]?[0-9]+ | \.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN) )$""",
    re.VERBOSE,
)
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+)$")


def _resolvers(base: type[yaml.resolver.Resolver]) -> dict[Any, Any]:
    """The base's, with YAML 1.2's numbers: 1.1 takes 2e-4 for text and 10:30:00 for a number to base 60."""
    replaced = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"}
    kept = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in replaced]
        for first, pairs in base.yaml_implicit_resolvers.items()
    }
    for tag, pattern, firsts in (("float", _FLOAT, "-+.0123456789"), ("int", _INT, "-+0123456789")):
        for first in firsts:
            kept.setdefault(first, []).append((f"tag:yaml.org,2002:{tag}", pattern))
    return kept


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(getattr(key, "value", ""))
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


_Loader.yaml_implicit_resolvers = _resolvers(yaml.SafeLoader)
_Dumper.yaml_implicit_resolvers = _resolvers(yaml.SafeDumper)


def parse(text: str, source: str) -> Any:
    """The value of one YAML document; plain objects only.

    Raises:
        UsageError: not YAML; names the source and the line.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{source} is not readable YAML{where}: {problem}") from error
    finally:
        loader.dispose()


def text_of(value: Any, in_a_line: bool = False) -> str:
    """YAML that `parse` reads back to the same value; `in_a_line` gives a mapping of mappings a line each, without its end."""
    if in_a_line:
        flow: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 10**9, "default_flow_style": True}
        return "\n".join(f"{key}: {yaml.dump(inner, Dumper=_Dumper, **flow).strip()}" for key, inner in value.items())
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
