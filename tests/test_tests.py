"""The tests' own layout: what several test modules need lies in plain modules, and models come from one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT

TESTS = ROOT / "tests"
MODELS = "tiny_models.py"
# Files that make a transformers configuration of their own, and why the factory would not do.
OWN_CONFIGURATIONS = {
    "benchmarks/speed_models.py": "large enough to be timed",
    "benchmarks/statistics_time.py": "large enough to be timed",
    "faults/test_signals.py": "large enough to be interrupted while it is loaded",
    "gpu/test_memory.py": "large enough for its bytes to show among the device's others",
    "loading/test_positions.py": "the defaults of many families, of which only some sizes change",
    "subspace/test_counts.py": "the sizes of published models, on the device meta",
    "subspace/core/test_targets.py": "the sizes of published models, on the device meta",
}
NO_MODELS = ("PretrainedConfig", "BitsAndBytesConfig", "GenerationConfig", "HfDeepSpeedConfig")


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


def configurations(source: str) -> list[str]:
    """The transformers configurations that a file makes by their classes' names or out of a mapping, in order."""
    tree = ast.parse(source)
    named = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
        for alias in node.names
    }
    return [
        kind for node in ast.walk(tree) if isinstance(node, ast.Call) for kind in [configuration(node, named)] if kind
    ]


def configuration(call: ast.Call, named: dict[str, str]) -> str | None:
    """The class or mapping whose configuration the call makes; None for other calls. `named`: what comes from transformers."""
    function = call.func
    kind = named.get(function.id) if isinstance(function, ast.Name) else None
    if isinstance(function, ast.Attribute) and ast.unparse(function.value).split(".")[0] == "transformers":
        kind = function.attr
    if isinstance(function, ast.Subscript) and ast.unparse(function.value).endswith("CONFIG_MAPPING"):
        return "CONFIG_MAPPING"
    if isinstance(function, ast.Call) and ast.unparse(function.func) == "getattr":
        written = ast.unparse(function.args[1])
        return written if "Config" in written else None
    return kind if kind is not None and kind.endswith("Config") and kind not in NO_MODELS else None


def test_models_are_made_by_one_file() -> None:
    """tests/families makes every family of transformers, by rules of its own."""
    makers = {path: configurations((TESTS / path).read_text()) for path in files_of_tests() if path != MODELS}
    found = {path for path, kinds in makers.items() if kinds and not path.startswith("families/")}
    assert found == set(OWN_CONFIGURATIONS), "tests/tiny_models.py makes a configuration of every family"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from transformers import LlamaConfig\nmodel = make(LlamaConfig(vocab_size=3))", ["LlamaConfig"]),
        ("import transformers\ntransformers.BertConfig()", ["BertConfig"]),
        ("import transformers\nmade = getattr(transformers, f'{name}Config')(**sizes)", ["f'{name}Config'"]),
        ("from transformers import CONFIG_MAPPING\nCONFIG_MAPPING[family]()", ["CONFIG_MAPPING"]),
        ("import peft\npeft.LoraConfig()\nfrom dist_subspace import SubspaceConfig\nSubspaceConfig()", []),
        ("import transformers\ntransformers.BitsAndBytesConfig(load_in_4bit=True)", []),
        ("from tests.tiny_models import tiny_config\ntiny_config('LlamaConfig', vocab_size=3)", []),
    ],
)
def test_a_configuration_of_transformers_is_found(source: str, expected: list[str]) -> None:
    assert configurations(source) == expected
