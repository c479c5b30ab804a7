"""The source of the classes that a model is made of, as syntax trees, parsed once a file."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator

LIBRARY = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation.utils", "builtins")


@functools.cache
def source(module: str) -> ast.Module | None:
    """The tree of a module, by its name; None where there is no source: typed at a prompt, or compiled."""
    try:
        return ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return None


@functools.cache
def functions(module: str) -> dict[str, ast.FunctionDef]:
    """The functions at the top of a module."""
    tree = source(module)
    return {} if tree is None else {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@functools.cache
def methods_of(owner: type) -> dict[str, ast.FunctionDef]:
    """The functions in a class's body; a class within a function is found by its qualified name."""
    scope: ast.Module | ast.ClassDef | ast.FunctionDef | None = source(owner.__module__)
    for part in owner.__qualname__.split("."):
        if part != "<locals>" and scope is not None:
            inside = (n for n in ast.walk(scope) if isinstance(n, ast.ClassDef | ast.FunctionDef))
            scope = next((node for node in inside if node.name == part), None)
    return {} if scope is None else {node.name: node for node in scope.body if isinstance(node, ast.FunctionDef)}


def definitions(kind: type, name: str) -> Iterator[tuple[type, ast.FunctionDef]]:
    """A method as the class has it, and as each class that it inherits from has it, those of the libraries' own bases apart."""
    for owner in kind.__mro__:
        if owner.__module__ not in LIBRARY and name in methods_of(owner):
            yield owner, methods_of(owner)[name]
