"""The layout holds: imports run downwards only, and other libraries' private names stay in the files meant for them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT

PACKAGE = ROOT / "dist_subspace"

AXES = {"storage", "placement", "subspace"}
BELOW_TRAINING = AXES | {
    *("errors", "config", "loading", "interchange", "accounting", "checkpoint", "report", "statistics", "atomic_files"),
    "notices",
    "launcher",
    "launchers",
    "stopping",
}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "launcher": set(),
    "launchers": {"errors"},
    "stopping": {"launcher"},
    "torch_internals": set(),
    "input_embeddings": set(),
    "notices": {"errors"},
    "class_source": set(),
    "module_places": set(),
    "unread_weight": {"errors"},
    "linear_map": {"torch_internals"},
    "atomic_files": {"errors"},
    "options": {"errors"},
    "config": {"errors", "storage"},
    "storage": {"errors", "linear_map", "class_source", "module_places", "options", "unread_weight"},
    "placement": {"errors", "class_source", "launcher", "launchers", "stopping"},
    "subspace": {
        "errors",
        "input_embeddings",
        "linear_map",
        "module_places",
        "notices",
        "options",
        "torch_internals",
        "unread_weight",
    },
    "loading": {"errors", "input_embeddings", "module_places", "notices", "storage", "placement"},
    "statistics": {"errors", "atomic_files", "loading"} | AXES,
    "interchange": {"errors", "atomic_files", "loading"} | AXES,
    "accounting": {"errors"} | AXES,
    "checkpoint": BELOW_TRAINING - {"report"},
    "report": BELOW_TRAINING,
    "advancing": {"errors", "statistics"} | AXES,
    "training": BELOW_TRAINING | {"api", "advancing"},
    "api": BELOW_TRAINING,
    "__init__": BELOW_TRAINING | {"training", "api", "advancing"},
    "cli": BELOW_TRAINING | {"training", "api", "__init__"},
    "__main__": {"cli"},
}

# The file for what a library does not promise; its docstrings name the version that was read. What tokenises does not import
# torch, so transformers has a second one for chat templates.
KEEPERS = {
    "deepspeed": tuple(
        f"placement/deepspeed/{n}.py" for n in ("shards", "partitioner", "leaf_blocks", "persistent", "fragments")
    ),
    "bitsandbytes": ("storage/bnb.py",),
    "transformers": ("loading/transformers_internals.py", "loading/template_internals.py"),
}
UNPROMISED_MODULES = {"deepspeed": "deepspeed.runtime", "bitsandbytes": "bitsandbytes.functional"}


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


def part_of(source: str, name: str | None, parts: set[str]) -> str | None:
    """The part of the package that an import reaches; None for other packages."""
    top, _, rest = source.partition(".")
    if top != "dist_subspace":
        return None
    if rest:
        return rest.split(".")[0]
    return name if name in parts else "__init__"


def layout_violations(source: str, path: str) -> list[str]:
    """Imports of the file at `path` (relative to the package) that go against the layout."""
    part = Path(path).parts[0].removesuffix(".py")
    if part not in ALLOWED:
        return [f"{path}: {part!r} has no place in the layout; give it one in {Path(__file__).name}"]
    module = "dist_subspace." + ".".join(Path(path).with_suffix("").parts)
    found = []
    for target, name, _, line in imports(ast.parse(source), module):
        reached = part_of(target, name, set(ALLOWED))
        if reached is not None and reached != part and reached not in ALLOWED[part]:
            found.append(f"{path}:{line}: {part} must not import {reached}")
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int, str]]:
    """(library, line, what) for each import of a name that the library does not promise."""
    for source, name, _, line in imports(tree, module):
        full = f"{source}.{name}" if name else source
        library = full.split(".")[0]
        if library not in KEEPERS:
            continue
        unpromised = UNPROMISED_MODULES.get(library, "")
        if any(map(is_private, full.split("."))) or (unpromised and f"{full}.".startswith(f"{unpromised}.")):
            yield library, line, full


def private_attributes(tree: ast.AST, module: str) -> Iterator[tuple[str, int, str]]:
    """(library, line, what) for `deepspeed.x._y`, `deepspeed.runtime.x` and every `ds_...` of a parameter."""
    aliases = {
        alias: f"{source}.{name}" if name else (alias if source.startswith(f"{alias}.") else source)
        for source, name, alias, _ in imports(tree, module)
        if source.split(".")[0] in KEEPERS
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("ds_") and node.value.isidentifier():
                yield "deepspeed", node.lineno, repr(node.value)
        elif isinstance(node, ast.Attribute):
            if node.attr.startswith("ds_"):
                yield "deepspeed", node.lineno, f".{node.attr}"
                continue
            chain = ast.unparse(node)
            root, _, rest = chain.partition(".")
            if root not in aliases or not all(map(str.isidentifier, chain.split("."))):
                continue
            full = f"{aliases[root]}.{rest}"
            library = full.split(".")[0]
            unpromised = UNPROMISED_MODULES.get(library, "")
            if is_private(node.attr) or (unpromised and full == unpromised):
                yield library, node.lineno, full


def private_violations(source: str, path: str) -> list[str]:
    """Uses of other libraries' private names in the file at `path` that belong into that library's keeper."""
    tree = ast.parse(source)
    module = "dist_subspace." + ".".join(Path(path).with_suffix("").parts)
    used = [*private_imports(tree, module), *private_attributes(tree, module)]
    return [
        f"{path}:{line}: {what} belongs into {KEEPERS[library][0]}"
        for library, line, what in used
        if path not in KEEPERS[library]
    ]


def package_files() -> list[str]:
    return sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", package_files())
def test_imports_run_downwards(path: str) -> None:
    assert layout_violations((PACKAGE / path).read_text(), path) == []


@pytest.mark.parametrize("path", package_files())
def test_private_names_of_libraries_stay_in_their_file(path: str) -> None:
    assert private_violations((PACKAGE / path).read_text(), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("storage/x.py", "from dist_subspace.placement import zero"),
        ("storage/x.py", "def f():\n    import dist_subspace.subspace.lora"),
        ("subspace/deep/x.py", "from ...storage import four_bit"),
        ("subspace/x.py", "from ..placement.deepspeed.shards import gathered"),
        ("placement/x.py", "from dist_subspace import storage"),
        ("loading/x.py", "from dist_subspace.subspace import lora"),
        ("checkpoint/x.py", "from dist_subspace.training.loop import train"),
        ("report/x.py", "import dist_subspace.training"),
        ("config.py", "from dist_subspace.subspace.core.registry import methods"),
        ("training/x.py", "from dist_subspace.cli import main"),
        ("training/x.py", "from dist_subspace import attach"),
        ("api.py", "from dist_subspace import cli"),
        ("newpart/x.py", "import os"),
    ],
)
def test_an_arrow_against_the_layout_is_found(path: str, source: str) -> None:
    assert len(layout_violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("storage/x.py", "from dist_subspace.errors import UsageError"),
        ("storage/x.py", "from dist_subspace.storage.operator import FrozenLinear\nfrom .dense import Dense"),
        ("training/data/x.py", "from ...checkpoint import store\nfrom dist_subspace import report"),
        ("__init__.py", "from dist_subspace.api import attach"),
        ("__main__.py", "from dist_subspace.cli import main"),
        ("cli.py", "import dist_subspace as dsub\nimport torch"),
    ],
)
def test_an_arrow_of_the_layout_passes(path: str, source: str) -> None:
    assert layout_violations(source, path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from deepspeed.runtime.zero.partition_parameters import Init",
        "from deepspeed import runtime",
        "import deepspeed\ndeepspeed.zero.Init._convert(p)",
        "import deepspeed as d\nx = d.runtime",
        "shard = parameter.ds_tensor",
        "hasattr(parameter, 'ds_id')",
        "from bitsandbytes.functional import quantize_4bit",
        "import bitsandbytes as bnb\nbnb.functional.quantize_4bit(x)",
        "from transformers.modeling_utils import _load_state_dict",
        "import transformers\ntransformers.modeling_utils._load_state_dict()",
    ],
)
def test_a_private_name_outside_its_file_is_found(source: str) -> None:
    assert private_violations(source, "training/x.py")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("training/x.py", "import deepspeed\nengine = deepspeed.initialize(model=m)\nengine._own = 1"),
        ("training/x.py", "import transformers\ntransformers.AutoModel.from_pretrained('x')\nself._private"),
        ("training/x.py", "import bitsandbytes as bnb\nbnb.optim.AdamW8bit([p])"),
        ("placement/deepspeed/shards.py", "from deepspeed.runtime.zero import partition_parameters\np.ds_tensor"),
        ("storage/bnb.py", "from bitsandbytes import functional"),
    ],
)
def test_public_names_and_the_keepers_pass(path: str, source: str) -> None:
    assert private_violations(source, path) == []
