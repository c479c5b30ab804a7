"""Every place of the product where ranks agree, read from its source: which call, in which function, on which lines."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.ranks import ROOT

# Functions at whose end a fault of one rank is everyone's, and the names that they go by in one place.
AGREEMENTS = {"agreed", "together", "on_main", "once_per_node", "on_rank_zero_only", "whole_on_main", "_on_whole"}
# Messages: what a rank has computed by then is for all of them.
MESSAGES = {
    *("gather_objects", "broadcast_object", "broadcast_tensors", "any_rank", "sum_over_ranks", "summed_over_ranks"),
    *("largest_over_ranks", "max_over_ranks", "barrier", "meet", "all_here", "refuse_unlike"),
}
OF_THEIR_OWN = "dist_subspace/placement/collectives.py"  # defines them


@dataclass(frozen=True)
class Place:
    """Lines of a file of the product, from `first` to `last`; `name` says which they are, and outlives edits of the file."""

    name: str
    file: str
    first: int
    last: int


@cache
def places() -> dict[str, Place]:
    """`file function call(argument)` -> the place, for every call of an agreement. A message has no argument in its name, and its
    place is the whole function: what a rank does for itself before it."""
    found: dict[str, Place] = {}
    for path in sorted((ROOT / "dist_subspace").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if file != OF_THEIR_OWN:
            for place in _places_in(path, file):
                assert place.name not in found or "(" not in place.name, f"two places have one name: {place.name}"
                found[place.name] = place
    return found


@cache
def function(name: str) -> Place:
    """The lines of a whole function or method: `training/engine Stepper.apply`."""
    short, _, wanted = name.partition(" ")
    file = f"dist_subspace/{short}.py"
    for node, qualified in _functions(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if qualified == wanted:
            return Place(name, file, node.lineno, node.end_lineno or node.lineno)
    raise LookupError(f"{file} has no function {wanted}")


def _places_in(path: Path, file: str) -> list[Place]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = {
        id(inner): (name, node) for node, name in _functions(tree) for inner in ast.walk(node)
    }  # the innermost is last
    blocks = {
        id(item.context_expr): node for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, whole = owners.get(id(node), ("", node))
        lines: ast.stmt | ast.expr = blocks.get(id(node), node)
        name = f"{file.removeprefix('dist_subspace/').removesuffix('.py')} {owner} {_called(node)}"
        if _called(node) in AGREEMENTS:
            name += f"({ast.unparse(node.args[0])})"
        elif _called(node) in MESSAGES:
            lines = whole
        else:
            continue
        found.append(Place(name, file, lines.lineno, lines.end_lineno or lines.lineno))
    return found


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _functions(tree: ast.AST, prefix: str = "") -> list[tuple[ast.FunctionDef, str]]:
    """Every function with its name, outer ones before those in them."""
    found: list[tuple[ast.FunctionDef, str]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found += [(node, prefix + node.name), *_functions(node, f"{prefix}{node.name}.")]
        else:
            found += _functions(node, f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix)
    return found
