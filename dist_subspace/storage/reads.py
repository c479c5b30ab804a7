"""Which linear layers a model reads the weight of, instead of calling them: found in the source of its classes.

Mamba computes `self.dt_proj.weight @ x`, MobileBERT joins `self.dense.weight` to its table, fused CUDA kernels are handed
`self.out_proj.weight`. Such a layer can neither be packed nor have a method: the read would pass both by. A run of the model
would show the reads of this machine only (the kernels' are made on CUDA). So the source is followed from every module's
`forward`, with the modules themselves in the place of the names: `self.mixer.out_proj` is looked up, a condition on the
configuration is decided.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dist_subspace.class_source import LIBRARY, definitions, functions, source
from dist_subspace.module_places import children_of

WEIGHTS = ("weight", "bias")
# Attributes of a weight that say something about it and read none of its values; `data` leads to them.
# fmt: off
_HARMLESS = {
    "dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_meta", "is_cuda", "layout", "new_zeros",
    "new_ones", "new_empty", "new_full", "element_size", "is_floating_point",
}
# fmt: on
_ASKING = ("isinstance", "hasattr", "type", "id")  # functions that ask a weight for no value
_PARTS = ("values", "items", "children", "modules")  # methods that give a module's parts
_SAME_ITEMS = ("enumerate", "zip", "list", "tuple", "reversed", "iter")

Values = list[Any]  # what an expression can be: modules and plain values of the model; empty where nothing is known


def read_layers(model: nn.Module, layers: Mapping[nn.Module, str]) -> dict[str, str]:
    """The layers (module -> name) whose weight or bias the model reads: name -> where, as `Class.method`."""
    given = set(inspect.signature(model.forward).parameters)
    reader = _Reader(layers, given)
    for module in model.modules():
        if module not in layers and _may_read(type(module)):
            reader.follow(module, "forward", {}, ())
    return reader.read_at


class _Reader:
    """Follows functions with the model's own modules as the values of their variables."""

    def __init__(self, layers: Mapping[nn.Module, str], given: set[str]) -> None:
        self.layers, self.given = layers, given
        self.read_at: dict[str, str] = {}

    def follow(self, module: nn.Module, name: str, bound: Mapping[str, Values], before: tuple[Any, ...]) -> None:
        """Every definition of the method that the module's class has or inherits (which may be called by `super`)."""
        for owner, function in definitions(type(module), name):
            if (owner, name) not in before and len(before) < 8:
                scope = _Scope(self, module, f"{type(module).__name__}.{name}", owner, (*before, (owner, name)))
                scope.run(function, bound)


class _Scope(ast.NodeVisitor):
    """One function: what its names can be, which branches the configuration rules out, and the weights that it reads."""

    def __init__(self, reader: _Reader, module: nn.Module, where: str, owner: type, before: tuple[Any, ...]) -> None:
        self.reader, self.module, self.where, self.owner, self.before = reader, module, where, owner, before
        self.names: dict[str, Values] = {}

    def run(self, function: ast.FunctionDef, bound: Mapping[str, Values]) -> None:
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args]
        defaults = zip(reversed(named), reversed(arguments.defaults), strict=False)
        optional = [*defaults, *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
        for argument, default in optional:
            # What the model's caller cannot give is None where that is its default (DeBERTa's `query_states`).
            if isinstance(default, ast.Constant) and default.value is None and argument.arg not in self.reader.given:
                self.names[argument.arg] = [None]
        self.names |= {"self": [self.module], **bound}
        for statement in function.body:
            self.visit(statement)

    # Reads.

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in WEIGHTS and isinstance(node.ctx, ast.Load):
            self._note(node.value)
        self.generic_visit(node)

    def _note(self, layer: ast.expr) -> None:
        for value in self.values(layer):
            name = self.reader.layers.get(value) if isinstance(value, nn.Module) else None
            if name is not None:
                self.reader.read_at.setdefault(name, self.where)

    def generic_visit(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if not _is_harmless(node, child):
                self.visit(child)
            else:
                self.visit(_weight_in(child).value)

    # Branches that the configuration rules out.

    def visit_If(self, node: ast.If) -> None:
        self._branches(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branches(node.test, [node.body], [node.orelse])

    def _branches(self, test: ast.expr, body: Iterable[ast.AST], other: Iterable[ast.AST]) -> None:
        self.visit(test)
        decided = self.truth(test)
        for child in (*(body if decided is not False else ()), *(other if decided is not True else ())):
            self.visit(child)

    def truth(self, test: ast.expr) -> bool | None:
        """What the condition is for this model, whatever its input; None where that is open."""
        if isinstance(test, ast.BoolOp):
            parts = [self.truth(part) for part in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in parts else (None if None in parts else not decisive)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            left, right = self.values(test.left), self.values(test.comparators[0])
            compare = _COMPARISONS.get(type(test.ops[0]))
            if compare is None or len(left) != 1 or len(right) != 1 or not _plain(left[0], right[0]):
                return None
            try:
                return bool(compare(left[0], right[0]))
            except TypeError:
                return None
        values = self.values(test)
        return bool(values[0]) if len(values) == 1 and _plain(values[0]) else None

    # Names.

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self._bind(node.target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._name(node.target, self._items(node.iter))
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._name(node.target, self._items(node.iter))
        self.visit(node.iter)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._comprehension(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        for part in (*node.generators, node.elt):
            self.visit(part)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
            pairs = list(zip(target.elts, value.elts, strict=False))
        for single, its in pairs:
            if isinstance(single, ast.Name):
                known = self.values(its)
                before = self.names.get(single.id, [])
                # A name that is given another value may be either from here on: branches are walked one after the other.
                self.names[single.id] = [*before, *known] if known else [v for v in before if isinstance(v, nn.Module)]
            else:
                self._name(single, [])

    def _name(self, target: ast.expr, values: Values) -> None:
        """Every name in the target may be any of the values."""
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self.names[node.id] = values

    def values(self, node: ast.AST) -> Values:
        """What an expression can be."""
        match node:
            case ast.Constant():
                return [node.value]
            case ast.Name():
                return self.names.get(node.id, [])
            case ast.Attribute():
                return _attributes(self.values(node.value), node.attr)
            case ast.IfExp():
                return [*self.values(node.body), *self.values(node.orelse)]
            case ast.BoolOp():
                return [value for part in node.values for value in self.values(part)]
            case ast.Tuple() | ast.List():
                return [value for part in node.elts for value in self.values(part)]
            case ast.Subscript(slice=ast.Constant(value=str(name))):
                return _submodules(self.values(node.value), name)
            case ast.Subscript():
                return _children(self.values(node.value))
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]):
                return _attributes(self.values(owner), name)
        return []

    def _items(self, node: ast.expr) -> Values:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SAME_ITEMS:
            return [value for argument in node.args for value in self._items(argument)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _PARTS:
            return _children(self.values(node.func.value))
        if isinstance(node, ast.Tuple | ast.List):
            return [value for part in node.elts for value in self.values(part)]
        return _children(self.values(node))

    # Calls.

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=name), *_]) if name in WEIGHTS:
                self._note(owner)
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name)):
                self._call([self.module], name, node)
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                self._call(self.values(owner), name, node)
            case ast.Call(func=ast.Name(id=name)):
                self._call_function(name, node)
        self.generic_visit(node)

    def _call(self, owners: Values, name: str, node: ast.Call) -> None:
        """A method of the module itself or of another one (Gemma 3n calls `self.altup.predict`)."""
        for owner in owners:
            if isinstance(owner, nn.Module):
                for _, function in definitions(type(owner), name):
                    bound = self._bound([a.arg for a in function.args.args][1:], node)
                    self.reader.follow(owner, name, bound, self.before)

    def _call_function(self, name: str, node: ast.Call) -> None:
        """A function of the same file: followed where it is handed a module."""
        function = functions(self.owner.__module__).get(name)
        if function is None or (name, None) in self.before or len(self.before) > 8:
            return
        bound = self._bound([a.arg for a in function.args.args], node)
        if any(isinstance(value, nn.Module) for values in bound.values() for value in values):
            scope = _Scope(self.reader, self.module, name, self.owner, (*self.before, (name, None)))
            scope.run(function, bound | {"self": bound.get("self", [])})

    def _bound(self, parameters: list[str], node: ast.Call) -> dict[str, Values]:
        given = {name: self.values(argument) for name, argument in zip(parameters, node.args, strict=False)}
        return given | {keyword.arg: self.values(keyword.value) for keyword in node.keywords if keyword.arg}


_COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
}


def _plain(*values: Any) -> bool:
    return all(value is None or isinstance(value, bool | int | float | str) for value in values)


def _attributes(owners: Values, name: str) -> Values:
    """The attribute of each: a submodule, or a plain value; `training` changes, and says nothing."""
    values = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            if name in children_of(owner):
                values.append(children_of(owner)[name])
            elif name in owner.__dict__ and name != "training":
                values.append(owner.__dict__[name])
        elif hasattr(owner, "to_dict") and hasattr(owner, name):  # a configuration
            values.append(getattr(owner, name))
    return values


def _submodules(owners: Values, name: str) -> Values:
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    return [children_of(module)[name] for module in modules if name in children_of(module)]


def _children(owners: Values) -> Values:
    return [child for owner in owners if isinstance(owner, nn.Module) for child in owner.children()]


def _weight_in(node: ast.AST) -> ast.Attribute:
    """`x.weight` of `x.weight` or `x.weight.data`."""
    assert isinstance(node, ast.Attribute)
    return node if node.attr in WEIGHTS else _weight_in(node.value)


def _is_weight(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and (
        node.attr in WEIGHTS
        or (node.attr == "data" and isinstance(node.value, ast.Attribute) and node.value.attr in WEIGHTS)
    )


def _is_harmless(parent: ast.AST, child: ast.AST) -> bool:
    """Whether the parent asks a weight for its type, shape or presence, and for no value."""
    if not _is_weight(child):
        return False
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS
    if isinstance(parent, ast.Call):
        function = parent.func
        asks = isinstance(function, ast.Name) and function.id in _ASKING
        return asks or (isinstance(function, ast.Name) and function.id == "getattr" and parent.args[:1] == [child])
    return isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)


def _may_read(kind: type) -> bool:
    """Whether the files of the class name a weight of something else than `self` at all: a quick look."""
    return any(_names_a_weight(owner.__module__) for owner in kind.__mro__ if owner.__module__ not in LIBRARY)


@functools.cache
def _names_a_weight(module: str) -> bool:
    tree = source(module)
    return tree is not None and any(
        (
            isinstance(n, ast.Attribute)
            and n.attr in WEIGHTS
            and not (isinstance(n.value, ast.Name) and n.value.id == "self")
        )
        or (isinstance(n, ast.Constant) and n.value in WEIGHTS)
        for n in ast.walk(tree)
    )
