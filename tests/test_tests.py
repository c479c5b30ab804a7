"""The tests' own layout: what several test modules need lies in plain modules, and models come from one file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT

TESTS = ROOT / "tests"
MODELS = "tiny_models.py"
# Files that make a transformers configuration of their own, and why the factory would not do.
OWN_CONFIGURATIONS = {
    "benchmarks/random_checkpoint.py": "large enough to be timed",
    "benchmarks/speed_models.py": "large enough to be timed",
    "benchmarks/statistics_time.py": "large enough to be timed",
    "config/shapes.py": "the shapes of the models that the recipes name, in their real size",
    "faults/test_signals.py": "large enough to be interrupted while it is loaded",
    "gpu/test_memory.py": "large enough for its bytes to show among the device's others",
    "loading/test_memory.py": "large enough for its bytes to show among a process's others",
    "loading/test_positions.py": "the defaults of many families, of which only some sizes change",
    "subspace/test_counts.py": "the sizes of published models, on the device meta",
    "subspace/core/test_targets.py": "the sizes of published models, on the device meta",
}
# Source files without a test of their own in the folder that mirrors theirs, and what holds them instead. Any other file has
# one of its name there, or one that imports it as its subject.
DECLARATIONS = "declares what parts or engines provide; every method's and placement's tests go through it"
STATES = "the tests of its whole package go through it"
WITHOUT_OWN_TESTS = {
    "__main__.py": "calls cli.py, as tests/test_cli.py does",
    "families/buffers.py": "tests/loading/test_types.py: what a family never saves",
    "families/names.py": "tests/subspace/core/test_targets.py: names by their components",
    **dict.fromkeys(
        ("interchange/loaded_adapter.py", "interchange/parts_without_base.py"), "tests/test_cli.py: folders alone"
    ),
    "publishing/command.py": "tests/publishing/test_push.py: the command itself",
    "interchange/model_description.py": "tests/interchange/test_description.py and tests/interchange/peft/test_export.py",
    "interchange/tensor_names.py": "tests/interchange/test_adapter.py: the names in a file",
    "interchange/peft/trained_in_full.py": "tests/interchange/peft/test_importing.py: modules_to_save",
    "interchange/peft/written_forms.py": "tests/interchange/peft/test_export.py: every method's form",
    "loading/held_weight.py": "tests/loading/formats: every format is one",
    "loading/notices.py": "tests/loading/test_types.py: what is kept in float32",
    "loading/own_class.py": "tests/interchange/test_for_class.py: vision and language models",
    **dict.fromkeys(
        [
            f"placement/deepspeed/{name}.py"
            for name in ("available", "fragments", "masters", "persistent", "pieces", "quiet")
        ],
        "tests/placement/deepspeed/test_zero.py and tests/training/test_engines.py: real engines",
    ),
    "placement/deepspeed/thresholds.py": "tests/placement/deepspeed/test_presets.py",
    **dict.fromkeys([f"placement/{name}.py" for name in ("edits", "eight_bit", "optimizer_state")], STATES),
    **dict.fromkeys([f"placement/{name}.py" for name in ("facts", "for_loading")], STATES),
    **dict.fromkeys([f"placement/{name}.py" for name in ("gradients", "stepped")], STATES),
    "placement/protocol.py": DECLARATIONS,
    **dict.fromkeys(("placement/whole/engine.py", "placement/whole/parameters.py"), STATES),
    "run_folder/manifest.py": "tests/checkpoint/test_store.py: files that are not what the manifest says",
    "statistics/rounds.py": "tests/statistics/test_setup.py: ranks that decompose in turn",
    **dict.fromkeys(("storage/four_bit.py", "storage/int8.py", "storage/packed.py"), "tests/storage/test_bnb.py"),
    "subspace/blocks/bottleneck.py": "tests/subspace/extension/test_houlsby.py and test_pfeiffer.py",
    "subspace/blocks/triplets.py": "tests/subspace/extension/test_adalora.py and test_flexlora.py",
    **dict.fromkeys([f"subspace/core/{name}.py" for name in ("bias", "constrained", "files", "forms")], DECLARATIONS),
    **dict.fromkeys(
        [f"subspace/core/{name}.py" for name in ("initial", "linear", "merging", "operator")], DECLARATIONS
    ),
    **dict.fromkeys([f"subspace/core/{name}.py" for name in ("rates", "shared", "sites")], DECLARATIONS),
    **dict.fromkeys([f"subspace/core/{name}.py" for name in ("statistic", "trained")], DECLARATIONS),
    **dict.fromkeys(
        [
            f"subspace/virtual_tokens/{name}.py"
            for name in ("attention", "input_tokens", "part", "prefix_hooks", "slots")
        ],
        "tests/subspace/reconstruction/test_prefix.py, test_prompt.py and test_p_tuning.py",
    ),
    "training/materials.py": "tests/training/test_plan.py and tests/training/test_preview.py: the run's own, and ahead of it",
    "training/objective.py": "tests/training/test_engine.py and tests/training/preferences/test_objectives.py: every step",
    "training/preferences/evaluate.py": "tests/training/preferences/test_objectives.py: a run's evaluations, at any ranks",
    "training/data/micro_batch.py": "tests/training/data/test_batches.py and tests/training/data/test_preference_batch.py",
    "training/data/worker.py": "tests/training/data/test_tokenising.py: a process of its own",
    **dict.fromkeys(
        ("training/last_words.py", "training/lost_ranks.py"),
        "tests/faults and tests/training/test_said.py",
    ),
}
NO_MODELS = (
    "PretrainedConfig",
    "BitsAndBytesConfig",
    "GenerationConfig",
    "HfDeepSpeedConfig",
    "HfTrainerDeepSpeedConfig",
)


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


def has_own_test(path: str, tests: dict[Path, str]) -> bool:
    """Whether the source file at `path` (relative to the package) has a test file of its name in the folder that mirrors its
    own, or one there that imports it."""
    file = Path(path)
    beside = {test: text for test, text in tests.items() if test.parent == file.parent}
    dotted = ".".join(["dist_subspace", *file.with_suffix("").parts]).removesuffix(".__init__")
    package, _, name = dotted.rpartition(".")
    pattern = (
        rf"from {re.escape(dotted)} import|import {re.escape(dotted)}\b|from {re.escape(package)} import .*\b{name}\b"
    )
    return file.with_name(f"test_{file.name}") in beside or any(re.search(pattern, text) for text in beside.values())


def has_logic(path: Path) -> bool:
    """A package's own file that only imports, names and describes has none."""
    return path.name != "__init__.py"


def test_every_source_file_has_a_test_beside_it_or_a_reason() -> None:
    package = ROOT / "dist_subspace"
    tests = {file.relative_to(TESTS): file.read_text() for file in TESTS.rglob("test_*.py")}
    sources = [str(file.relative_to(package)) for file in sorted(package.rglob("*.py")) if has_logic(file)]
    without = {path for path in sources if not has_own_test(path, tests)}
    assert sorted(without - set(WITHOUT_OWN_TESTS)) == [], (
        "has no test in the folder that mirrors its own, and no reason"
    )
    assert sorted(set(WITHOUT_OWN_TESTS) - without) == [], "needs no reason: it is gone, or it has a test"


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ({"training/test_run.py": ""}, True),
        ({"training/test_whole.py": "from dist_subspace.training.run import train"}, True),
        ({"training/test_whole.py": "from dist_subspace.training import plan, run"}, True),
        ({"training/test_whole.py": "from dist_subspace.training.running import train"}, False),
        ({"test_run.py": "from dist_subspace.training.run import train"}, False),
    ],
    ids=str,
)
def test_a_test_is_found_by_its_place_or_its_subject(tests: dict[str, str], expected: bool) -> None:
    assert has_own_test("training/run.py", {Path(name): text for name, text in tests.items()}) == expected
