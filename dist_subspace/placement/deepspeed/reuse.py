"""Whether a model calls each block of a stack once in a forward: seen in the source of its classes.

ZeRO-3 may take a block as one leaf only then. DeepSpeed reduces a leaf's gradients in a full backward hook, which fires at every
use: of a block that is used twelve times (ALBERT's one group, a Universal Transformer's, a module under two names) each use's
part would be reduced as if it were the whole, and the second meets the first in the bucket (an empty AssertionError). What cannot
be read is not called once: all that a leaf does is to save gathers.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from dist_subspace.class_source import definitions

_MANY = 2
_SAME_ITEMS = ("enumerate", "zip", "reversed", "list", "tuple", "iter", "islice")
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)


def called_once(model: nn.Module, name: str) -> bool:
    """Whether every entry of the module list of that (dotted) name is called exactly once in a forward of the model."""
    parent, _, attribute = name.rpartition(".")
    owner, stack = model.get_submodule(parent), model.get_submodule(name)
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    several = any(names[module] > 1 for module in (owner, stack, *stack.children()))
    layers = getattr(getattr(owner, "config", None), "num_hidden_layers", None)
    if several or (isinstance(layers, int) and layers > len(list(stack.children()))):
        return False
    if _Uses(type(owner), attribute, _in_a_stack).most("forward") != 1:
        return False
    while parent:
        parent, _, child = parent.rpartition(".")
        if _Uses(type(model.get_submodule(parent)), child, _itself).most("forward") > 1:
            return False
    return True


class _Uses:
    """How often one pass through a class's methods calls its attribute `name`, or the entries of it, at most.

    calls: whether an expression is a call of what is counted, given the class's attribute and the names that stand for entries.
    """

    def __init__(self, kind: type, name: str, calls: Callable[[ast.AST, str, Sequence[str]], bool]) -> None:
        self.kind, self.name, self.calls = kind, name, calls
        self.within: list[str] = []
        self.entries: list[str] = []

    def most(self, method: str) -> int:
        if method in self.within:
            return 0
        self.within.append(method)
        definition = next((function for _, function in definitions(self.kind, method)), None)
        count = 0 if definition is None else self._in_order(definition.body)
        self.within.pop()
        return count

    def _in_order(self, statements: Sequence[ast.stmt]) -> int:
        """Of statements one after the other; behind a branch that ends the function the others are its alternative."""
        total = 0
        for number, statement in enumerate(statements):
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return | ast.Raise | ast.Continue):
                others = self._in_order([*statement.orelse, *statements[number + 1 :]])
                return total + self._in(statement.test) + max(self._in_order(statement.body), others)
            total += self._in(statement)
        return total

    def _in(self, node: ast.AST) -> int:
        if isinstance(node, ast.If):
            return self._in(node.test) + max(self._in_order(node.body), self._in_order(node.orelse))
        if isinstance(node, ast.IfExp):
            return self._in(node.test) + max(self._in(node.body), self._in(node.orelse))
        if isinstance(node, _LOOPS):
            return self._in_loop(node)
        count = int(self.calls(node, self.name, self.entries))
        if isinstance(node, ast.Call) and _of_self(node.func):
            count += self.most(node.func.attr)  # type: ignore[attr-defined]
        return count + sum(self._in(child) for child in ast.iter_child_nodes(node))

    def _in_loop(self, loop: ast.AST) -> int:
        """A loop over the stack calls each entry as often as its body does; another one may do so any number of times."""
        source, target = _head(loop)
        over = source is not None and _is_over(source, self.name)
        before = list(self.entries)
        if over and source is not None and target is not None:
            self.entries += _entries(source, target, self.name)
        body = [*loop.body, *loop.orelse] if isinstance(loop, ast.For | ast.While) else []
        count = self._in_order(body) if body else sum(self._in(child) for child in ast.iter_child_nodes(loop))
        self.entries = before
        return count if over else min(_MANY, _MANY * count)


def _head(loop: ast.AST) -> tuple[ast.expr | None, ast.expr | None]:
    if isinstance(loop, ast.For):
        return loop.iter, loop.target
    generators: list[ast.comprehension] = getattr(loop, "generators", [])
    return (generators[0].iter, generators[0].target) if len(generators) == 1 else (None, None)


def _is_over(node: ast.expr, name: str) -> bool:
    """`self.layers`, a slice of it, it among others in `zip`, or `range(len(self.layers))`."""
    if _is_own(node, name):
        return True
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        return _is_over(node.value, name)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if called == "range" and len(node.args) == 1 and isinstance(node.args[0], ast.Call):
            return any(_is_own(argument, name) for argument in node.args[0].args)
        return called in _SAME_ITEMS and any(_is_over(argument, name) for argument in node.args)
    return False


def _entries(source: ast.expr, target: ast.expr, name: str) -> list[str]:
    """The names that stand for an entry of the stack in a loop over it, and not for its number or what is zipped to it."""
    if isinstance(source, ast.Call) and isinstance(target, ast.Tuple | ast.List):
        called = getattr(source.func, "id", "")
        if called == "enumerate" and len(target.elts) == 2:
            return _entries(source.args[0], target.elts[1], name)
        if called == "zip" and len(target.elts) == len(source.args):
            pairs = zip(source.args, target.elts, strict=True)
            return [
                entry
                for part, part_target in pairs
                if _is_over(part, name)
                for entry in _entries(part, part_target, name)
            ]
    if getattr(getattr(source, "func", None), "id", "") == "range":
        return []
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def _is_own(node: ast.AST, name: str) -> bool:
    return _of_self(node) and node.attr == name  # type: ignore[attr-defined]


def _of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _itself(node: ast.AST, name: str, entries: Sequence[str]) -> bool:
    return isinstance(node, ast.Call) and _is_own(node.func, name)


def _in_a_stack(node: ast.AST, name: str, entries: Sequence[str]) -> bool:
    """`layer(x)`, `layer.forward(x)`, `self.layers[i](x)`, or a layer handed to who calls it (a checkpointing function)."""
    if not isinstance(node, ast.Call):
        return False
    function = node.func.value if _is_forward(node.func) else node.func  # type: ignore[attr-defined]
    handed = [argument.value if _is_forward(argument) else argument for argument in node.args]  # type: ignore[attr-defined]
    return any(
        (isinstance(one, ast.Name) and one.id in entries)
        or (isinstance(one, ast.Subscript) and _is_own(one.value, name))
        for one in (function, *handed)
    )


def _is_forward(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("forward", "__call__")
