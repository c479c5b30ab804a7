"""launch/test.sh and launch/environment.sh on a tree of their own: what is red anywhere is the exit status, and nothing runs in
another environment than the one that is named."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.ranks import ROOT

SETUP = "[options]\ninstall_requires =\n    pytest>=8\n[options.extras_require]\ntest =\n    ruff>=0.1\n"
PROJECT = """
[tool.ruff]
line-length = 120
extend-exclude = ["env", "launch"]
[tool.mypy]
packages = ["own"]
[tool.pytest.ini_options]
testpaths = ["tests"]
markers = ["slow: long"]
"""
TESTS = """
import os
import sys

import pytest


def test_the_environment() -> None:
    wanted = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    assert {name: os.environ.get(name) for name in wanted} == wanted
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == os.getcwd()
    assert sys.prefix == os.environ["WANTED"]


@pytest.mark.slow
def test_that_fails() -> None:
    assert not os.environ["WANTED"]
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launch folder beside a package of one file; an environment that finds this one's packages."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "launch", root / "launch")
    for folder, text in (("own", ""), ("tests", ""), ("tests/mutants", "")):
        (root / folder).mkdir()
        (root / folder / "__init__.py").write_text(text)
    (root / "tests" / "test_own.py").write_text(TESTS.lstrip())
    (root / "tests" / "mutants" / "__main__.py").write_text("import sys\n\nsys.exit(len(sys.argv[1:]) + 40)\n")
    (root / "setup.cfg").write_text(SETUP)
    (root / "pyproject.toml").write_text(PROJECT)
    venv.create(root / "env", symlinks=True)
    found = sysconfig.get_paths(vars={"base": str(root / "env"), "platbase": str(root / "env")})["purelib"]
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(found) / "outer.pth").write_text("\n".join([*packages, *site.getsitepackages()]))
    return root


def run(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    left_out = ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    own |= {"DIST_SUBSPACE_PYTHON": str(tree / "env" / "bin" / "python"), "WANTED": str(tree / "env")}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    script = [str(tree / "launch" / "test.sh"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, timeout=300, env=own | environment, cwd=tree.parent)


def test_a_check_that_is_red_is_the_status_and_slow_tests_are_asked_for(tree: Path) -> None:
    alone = ("-n", "0", "-p", "no:cacheprovider")
    good = run(tree, *alone)
    assert good.returncode == 0 and "1 passed, 1 deselected" in good.stdout, good.stdout + good.stderr
    assert "all requirements are met by" in good.stderr
    slow = run(tree, "--slow", *alone)
    assert slow.returncode == 1 and "1 failed, 1 passed" in slow.stdout, slow.stdout + slow.stderr
    assert "[environment]" not in slow.stderr, "what was looked at once is not looked at again"
    for text, check in (
        ("x  =  1\n", "ruff format --check ."),
        ("x = 1\nimport os\n", "ruff check ."),
        ('x: int = ""\n', "python -m mypy"),
    ):
        (tree / "own" / "__init__.py").write_text(text)
        red = run(tree, *alone)
        assert red.returncode == 1 and "1 passed" in red.stdout, red.stdout + red.stderr
        assert f"FAILED before pytest: {check}\n" in red.stdout
    (tree / "own" / "__init__.py").write_text("")


def test_mutants_are_handed_over_with_their_arguments_and_their_status(tree: Path) -> None:
    assert run(tree, "--mutants", "--only", "some-*").returncode == 42


def test_what_is_missing_and_cannot_be_installed_stops_everything(tree: Path) -> None:
    (tree / "setup.cfg").write_text(SETUP.replace("ruff>=0.1", "ruff>=999"))
    done = run(tree, "-n", "0", PIP_NO_INDEX="1")
    (tree / "setup.cfg").write_text(SETUP)
    assert done.returncode != 0 and "pytest" not in done.stdout, done.stdout
    assert "missing: ruff>=999" in done.stderr and "pip could not install" in done.stderr
    other = run(tree, DIST_SUBSPACE_PYTHON=str(tree / "no" / "python"))
    assert other.returncode != 0 and "does not start" in other.stderr and other.stdout == ""
