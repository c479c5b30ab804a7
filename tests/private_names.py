"""Which names of other libraries are promised, and where in a source file one is used that is not.

A name that a library does not promise moves with any release. It stays in a *keeper*: a small file that says in its docstring
which version was read. Everything is read from the source text; nothing of the package is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.ranks import ROOT

# What tokenises does not import torch, so transformers has a keeper for chat templates; and `subspace` does not import
# `loading`, so it has one for the tables that models look their functions up in.
KEEPERS = {
    "deepspeed": tuple(
        f"placement/deepspeed/{name}.py"
        for name in (
            *("shards", "secondary", "partitioner", "leaf_blocks", "persistent", "fragments", "embeddings"),
            *("split_rows", "apart"),
        )
    ),
    "bitsandbytes": ("storage/bnb.py",),
    "transformers": (
        "loading/transformers_internals.py",
        "loading/experts_internals.py",
        "loading/template_internals.py",
        "loading/sentencepiece_tokenizer.py",
        "transformers_tables.py",
        "trainers/trainer_internals.py",
    ),
    "torch": ("torch_internals.py", "module_places.py"),
    "datasets": ("training/data/sources.py",),
    "trl": ("training/preferences/trl_losses.py",),
}
ALL_KEEPERS = frozenset(path for paths in KEEPERS.values() for path in paths)

# Modules whose public names are not promised either, with all that is in them.
UNPROMISED_MODULES = {"deepspeed": "deepspeed.runtime", "bitsandbytes": "bitsandbytes.functional"}

# transformers promises what its top level exports and its documentation lists; files and folders below it, `models` among them,
# are reorganised with most releases. Beyond the top level, these are what its page "Attention interface" tells users to import.
PROMISED_BY_TRANSFORMERS = {
    "transformers.integrations.sdpa_attention.sdpa_attention_forward",
    "transformers.masking_utils.sdpa_mask",
}

# Names that begin with an underscore and are promised all the same.
PROMISED_NAMES = {
    *("_exit", "_current_frames"),  # Python documents them
    # These stand in files that torch's wrappers wrote.
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}

# What Python tells about its own inside; none of it is needed by who calls a library as it is meant to be called.
# fmt: off
TRICKS = {
    "__globals__", "__code__", "__closure__", "__defaults__", "__kwdefaults__", "__builtins__", "__subclasses__", "co_names",
    "co_varnames", "co_consts", "co_code", "f_locals", "f_globals", "f_back", "gi_frame", "tb_frame",
}
# fmt: on

# What torch documents of an optimizer; of an engine, it is our own protocol that says what is asked for outside
# `placement/deepspeed`.
OPTIMIZER_NAMES = {"param_groups", "state", "defaults", "step", "zero_grad", "state_dict", "load_state_dict"}

# fmt: off
OF_TEXTS = {
    "startswith", "endswith", "removeprefix", "removesuffix", "split", "partition", "rpartition", "replace", "join",
}
# fmt: on


class Use(NamedTuple):
    """A use of a name that is not promised; `library` is None where the text does not say whose name it is."""

    library: str | None
    line: int
    name: str


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, str | None, str, int]]:
    """Every import as (module, name or None, local alias, line); relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, alias.asname or alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                source = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                yield source, alias.name, alias.asname or alias.name, node.lineno


def module_of(path: str) -> str:
    """The module of a file, whose path is relative to the package."""
    return "dist_subspace." + ".".join(Path(path).with_suffix("").parts)


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore; what we put on others' objects begins with the package's name, too."""
    return bool(re.fullmatch(r"_(?!dist_subspace)[A-Za-z]\w*", name))


@cache
def _folder(library: str) -> Path | None:
    spec = importlib.util.find_spec(library)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@cache
def is_module(name: str) -> bool:
    """Whether a dotted name is a module of an installed library, which is not imported for that."""
    library, *rest = name.split(".")
    folder = _folder(library)
    if folder is None or not rest:
        return folder is not None
    path = folder.joinpath(*rest)
    return path.is_dir() or path.with_suffix(".py").is_file()


def is_promised(name: str) -> bool:
    """Whether a library promises a dotted name that begins with the library's own."""
    parts = name.split(".")
    if any(map(is_private, parts)):
        return False
    if parts[0] == "transformers":
        return name in PROMISED_BY_TRANSFORMERS or not is_module(".".join(parts[:2])) or len(parts) == 1
    unpromised = UNPROMISED_MODULES.get(parts[0])
    return unpromised is None or not f"{name}.".startswith(f"{unpromised}.")


def imported_names(tree: ast.AST, module: str) -> Iterator[Use]:
    """Imports of what a library does not promise, those by `import_module` among them."""
    for source, name, _, line in imports(tree, module):
        full = f"{source}.{name}" if name else source
        if full.split(".")[0] in KEEPERS and not is_promised(full):
            yield Use(full.split(".")[0], line, full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if isinstance(name, str) and name.split(".")[0] in KEEPERS and not is_promised(name):
                yield Use(name.split(".")[0], node.lineno, name)


def chained_names(tree: ast.AST, module: str) -> Iterator[Use]:
    """`library.part._name`, whatever the library or the part is called in this file."""
    aliases = {
        alias: f"{source}.{name}" if name else (alias if source.startswith(f"{alias}.") else source)
        for source, name, alias, _ in imports(tree, module)
        if source.split(".")[0] in KEEPERS
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in aliases and all(map(str.isidentifier, rest.split("."))):
                full = f"{aliases[root]}.{rest}"
                if is_promised(full.rpartition(".")[0]) and not is_promised(full):
                    yield Use(full.split(".")[0], node.lineno, full)


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def own_names(tree: ast.AST) -> set[str]:
    """Names that the file itself binds: functions, classes, variables, arguments, attributes of `self`."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            own.add(node.attr)
    return own


def words(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Attributes, and texts that could name one; not the parts of a text that are looked for or put together."""
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and called(node) in OF_TEXTS)
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value, node.lineno


def foreign_words(tree: ast.AST) -> Iterator[Use]:
    """Private names that the file does not define, marks of ZeRO (`ds_...`) and tricks, as attributes or as texts."""
    own = own_names(tree)
    for word, line in words(tree):
        if word.startswith("ds_") and word.isidentifier():
            yield Use("deepspeed", line, word)
        elif word in TRICKS or (is_private(word) and word not in own | PROMISED_NAMES):
            yield Use(None, line, word)


@cache
def engine_names() -> tuple[set[str], set[str]]:
    """What an engine of the package has (the protocol `Engine`), and what of it may be assigned."""
    tree = ast.parse((ROOT / "dist_subspace/placement/protocol.py").read_text(encoding="utf-8"))
    engine = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Engine")
    members = [node for node in engine.body if isinstance(node, ast.FunctionDef)]
    settable = {node.name for node in members for by in node.decorator_list if ast.unparse(by).endswith(".setter")}
    return {node.name for node in members}, settable


def engine_words(tree: ast.AST) -> Iterator[Use]:
    """What is asked of an engine that the package's own has not, of an optimizer that torch does not document, and every
    attribute of theirs that is assigned."""
    names, settable = engine_names()
    known, assigned = {"engine": names, "optimizer": OPTIMIZER_NAMES}, {"engine": settable, "optimizer": set()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder, name, written = node.value, node.attr, not isinstance(node.ctx, ast.Load)
        elif isinstance(node, ast.Call) and called(node) in ("getattr", "hasattr", "setattr", "delattr"):
            holder, text, written = node.args[0], node.args[1], called(node) in ("setattr", "delattr")
            name = text.value if isinstance(text, ast.Constant) else ""
        else:
            continue
        kind = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
        if kind in known and name not in (assigned if written else known)[kind]:
            yield Use("deepspeed", node.lineno, str(name))


def private_violations(source: str, path: str) -> list[str]:
    """Uses of what libraries do not promise in the file at `path` that belong into a keeper."""
    tree, module = ast.parse(source), module_of(path)
    uses = {*imported_names(tree, module), *chained_names(tree, module)}
    if not path.startswith("placement/deepspeed/"):
        uses |= set(engine_words(tree))
    if path not in ALL_KEEPERS:
        uses |= set(foreign_words(tree))
    return [
        f"{path}:{use.line}: {use.name} belongs into {'a keeper' if use.library is None else KEEPERS[use.library][0]}"
        for use in sorted(uses, key=lambda use: (use.line, use.name))
        if path not in (ALL_KEEPERS if use.library is None else KEEPERS[use.library])
    ]
