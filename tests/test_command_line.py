"""The program around its commands: version, help, completion, and what a start imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_subspace import __version__
from dist_subspace.cli import main
from dist_subspace.command_line import app
from tests.ranks import ROOT


def commands() -> list[str]:
    return [info.name or info.callback.__name__ for info in app.registered_commands if info.callback is not None]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1", **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dist-subspace {__version__}\n"


def test_without_a_command_the_help_is_shown_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and all(f" {name} " in printed.out for name in commands())


@pytest.mark.parametrize("name", commands())
def test_the_help_of_a_command_ends_with_an_example_of_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"Example: dist-subspace {name}( |$)", printed), printed


def test_a_command_that_lacks_something_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: Missing argument 'config'.\n" and printed.out == ""


def test_the_shell_completes_commands_and_keys() -> None:
    words = "dist-subspace train my.yaml training.learning_r"
    found = run(
        *("-c", "from dist_subspace.cli import main; import sys; sys.argv[0] = 'dist-subspace'; sys.exit(main([]))"),
        **{"_DIST_SUBSPACE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"},
    )
    assert found.stdout.split() == ["training.learning_rate="], found


def test_schema_explains_a_key_and_writes_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "run.profile"]) == 0
    assert capsys.readouterr().out.startswith("run.profile\n  accepted  whole number at least 1 or null\n")
    assert main(["schema", "--yaml"]) == 0
    assert set(yaml.safe_load(capsys.readouterr().out)) >= {"model", "data", "training", "run"}
    assert main(["schema", "run.profiles"]) == 2
    assert "the nearest: run.profile" in capsys.readouterr().err


# What a start has no use for, and would wait for.
NEVER = ("matplotlib", "datasets", "pandas", "scipy", "sklearn", "tensorboard", "wandb", "mlflow", "trl", "pygments")
# Of torch's compiler and DeepSpeed the one is of use to nobody here, and the other to those who have chosen it.
HEAVY = ("torch._inductor.compile_fx", "deepspeed")


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import dist_subspace.cli", (*NEVER, "torch", "transformers", "deepspeed", "numpy", "pydantic")),
        (
            "import dist_subspace.training.run",
            (*(name for name in NEVER if name != "scipy"), *HEAVY),
        ),  # transformers brings scipy
    ],
)
def test_a_start_imports_nothing_that_it_does_not_need(program: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    script = f"{program}\nimport sys\nprint(sorted(set({absent!r}) & set(sys.modules)))"
    found = run("-c", script)
    assert found.stdout.strip() == "[]", found
