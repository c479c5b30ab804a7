"""The version has one home, and a release is what the repository holds: built, installed and tested."""

from __future__ import annotations

import configparser
import email
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import dist_subspace
from tests.ranks import ROOT


def test_the_version_stands_in_the_package_alone() -> None:
    """And it is one that the version policy has: three numbers, or a pre-release of them."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: dist_subspace.__version__"
    numbers = dist_subspace.__version__.split(".")
    assert len(numbers) >= 3 and all(number.isdecimal() for number in numbers[:2])
    package = ROOT / "dist_subspace"
    found = [file for file in package.rglob("*.py") if f'"{dist_subspace.__version__}"' in file.read_text()]
    assert found == [package / "__init__.py"]


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_of_the_repository_is(tmp_path: Path) -> None:
    """One run of the command line, from the wheel; the rest of its tests are for `launch/release.sh` itself."""
    test = (
        "tests/test_cli.py::"
        "test_train_takes_changes_and_leaves_with_the_runs_status_and_the_final_adapter_is_what_a_run_is"
    )
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "HF_HUB_OFFLINE": "1"}
    command = [str(ROOT / "launch" / "release.sh"), test]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1 passed" in done.stdout
    (wheel,), (sdist,) = (tmp_path / "out").glob("*.whl"), (tmp_path / "out").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (place,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(place))
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "dist_subspace").rglob("*.py")}
    assert sources | {"dist_subspace/py.typed"} == {name for name in names if ".dist-info/" not in name}
    assert said["Version"] == dist_subspace.__version__ and "Apache-2.0" in (
        said["License-Expression"],
        said["License"],
    )
    with tarfile.open(sdist) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    for name in (
        "docs/design.md",
        "launch/train.py",
        "tests/conftest.py",
        "configs/cpu-smoke.yaml",
        "LICENSE",
        "README.md",
    ):
        assert name in inside, name
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "holds distributions already" in again.stderr
