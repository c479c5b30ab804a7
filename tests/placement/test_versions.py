"""What is compared between nodes says what is there, and is read without importing it."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from dist_subspace.placement.versions import facts, package_digest
from tests.ranks import ROOT


def test_the_digest_of_a_package_is_that_of_its_sources(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("anything")
    first = package_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("something else")
    assert package_digest(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert package_digest(tmp_path) != first
    assert package_digest() == package_digest(ROOT / "dist_subspace")


def test_the_versions_are_those_of_the_installed_packages_and_torch_is_not_imported() -> None:
    assert facts()["transformers"] == metadata.version("transformers")
    script = "import sys; from dist_subspace.placement.versions import facts; facts(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0
