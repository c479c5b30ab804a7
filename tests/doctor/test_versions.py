"""Packages that differ, are missing or cannot be imported are named with their place; what need not be alike is a remark."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.doctor.versions import judge
from tests.doctor.facts import ranks_of, sentences
from tests.ranks import ROOT

GOOD: dict[str, Any] = {
    "versions": {"Python": "3.11", "dist_subspace": "aa", "torch": "2.13.0", "bitsandbytes": "0.50", "rich": "15"},
    "broken": {},
    "python": "/env/bin/python",
    "commit": None,
}


def with_versions(broken: dict[str, str] | None = None, **versions: str | None) -> dict[str, Any]:
    made = copy.deepcopy(GOOD)
    made["versions"] |= versions
    made["broken"] |= broken or {}
    return made


def test_alike_versions_are_no_finding_and_neither_are_two_builds_of_one_version() -> None:
    ranks = ranks_of("versions", [GOOD, GOOD, with_versions(torch="2.13.0+cpu")])
    assert sentences(ranks, judge(ranks), breaks=True) == []


@pytest.mark.parametrize(
    ("name", "version", "what"),
    [
        ("bitsandbytes", "0.1", "node3 (rank 2): bitsandbytes is 0.1, and 0.50 on node1, node2 (ranks 0, 1)"),
        ("Python", "3.12", "node3 (rank 2): Python is 3.12, and 3.11 on node1, node2 (ranks 0, 1)"),
        (
            "dist_subspace",
            "bb",
            "node3 (rank 2): the files of this package are others (bb) than on node1, node2 (ranks 0, 1) (aa)",
        ),
    ],
)
def test_what_computes_must_be_alike(name: str, version: str, what: str) -> None:
    ranks = ranks_of("versions", [GOOD, GOOD, with_versions(**{name: version})])
    assert sentences(ranks, judge(ranks), breaks=True) == [what]


def test_what_only_prints_may_differ() -> None:
    ranks = ranks_of("versions", [GOOD, with_versions(rich="14")])
    assert sentences(ranks, judge(ranks), breaks=True) == []
    assert sentences(ranks, judge(ranks)) == ["node2 (rank 1): rich is 14, and 15 on node1 (rank 0)"]


def test_a_package_that_is_missing_or_broken_is_named_with_the_command_that_mends_it() -> None:
    missing = with_versions({"bitsandbytes": "ModuleNotFoundError: x"}, bitsandbytes=None)
    ranks = ranks_of("versions", [GOOD, missing, with_versions({"torch": "OSError: libcuda.so"})])
    one, other = sorted(judge(ranks), key=lambda found: found.ranks)
    assert sentences(ranks, [one, other]) == [
        "node2 (rank 1): bitsandbytes is not installed for /env/bin/python",
        "node3 (rank 2): torch 2.13.0 cannot be imported (OSError: libcuda.so)",
    ]
    assert one.breaks and "/env/bin/python -m pip install bitsandbytes" in one.do


def test_packages_that_are_not_there_are_found_missing_in_a_process_of_their_own(tmp_path: Path) -> None:
    """One that is not found, and one whose folder is empty, which Python imports as a package of no file."""
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sentencepiece'] = None\n")
    script = (
        "import sys\nfrom dist_subspace.doctor import versions\n"
        "versions.NEEDED = {name: name for name in ('sentencepiece', 'numpy')}\n"
        "found = versions.examine()\nprint(found['broken'])\nassert found['python'] == sys.executable\n"
        "sys.path = sys.path[:2]\nversions.NEEDED = {'tokenizers': 'tokenizers'}\nprint(versions.examine()['broken'])\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "sentencepiece" in first and "numpy" not in first
    assert second == "{'tokenizers': 'its folder is empty'}"
