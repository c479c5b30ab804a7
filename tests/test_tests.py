"""The tests' own layout: what several test modules need lies in a plain module, which any of them can be read without."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT

TESTS = ROOT / "tests"


def files_of_tests() -> list[str]:
    """All but this one, which shows what is forbidden."""
    return sorted(str(file.relative_to(TESTS)) for file in TESTS.rglob("*.py") if file != Path(__file__))


def is_test_module(dotted: str) -> bool:
    return dotted.startswith("tests.") and any(part.startswith("test_") for part in dotted.split("."))


def imported(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, of one inside a function and of lines for another Python too; each name that is imported
    from a package may be a module of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            yield source, node.lineno
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            yield from ((name, node.lineno) for name, _ in imported(program(node.value), package))


def program(text: str) -> ast.AST:
    """The imports of a text that is a program, line by line: the rest of it may be a template."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(("from tests", "import tests"))]
    for line in lines:
        try:
            ast.parse(line)
        except SyntaxError:
            return ast.Module([], [])
    return ast.parse("\n".join(lines))


def imports_of_tests(source: str, path: str) -> list[str]:
    """Where the file at `path` (relative to the tests) imports a test module other than itself."""
    own = ".".join(["tests", *Path(path).with_suffix("").parts])
    package = own.rpartition(".")[0]
    found = {
        line: name
        for name, line in imported(ast.parse(source), package)
        if is_test_module(name) and name != own and not name.startswith(f"{own}.")
    }
    return [f"{path}:{line}: {name} is a test module; move what it shares" for line, name in found.items()]


def test_no_file_imports_a_test_module() -> None:
    assert [found for path in files_of_tests() for found in imports_of_tests((TESTS / path).read_text(), path)] == []


@pytest.mark.parametrize(
    "source",
    [
        "from tests.training.test_run import losses",
        "from tests.training import test_run as runs",
        "import tests.training.test_run",
        "from .test_run import losses",
        "from . import test_run",
        "from ..placement import test_hf_trainer",
        "def test() -> None:\n    from tests.training.test_run import losses",
        "PROGRAM = '''\nimport sys\nfrom tests.training.test_run import losses\nlosses()\n'''",
    ],
)
def test_an_import_of_a_test_module_is_found(source: str) -> None:
    assert len(imports_of_tests(source, "training/test_other.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from tests.whole_runs import losses",
        "from tests.training import engines",
        "from .engines import stepper_of",
        "import pytest\nfrom dist_subspace.training.run import train",
        "PROGRAM = 'from tests.training.test_other import losses'",
        '"""A test may import nothing from tests that others hold."""',
    ],
)
def test_a_helper_and_the_module_itself_may_be_imported(source: str) -> None:
    assert imports_of_tests(source, "training/test_other.py") == []
