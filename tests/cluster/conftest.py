"""Hosts, a SLURM, and a tiny recipe that all of them see. Skips, and says why, where this machine cannot have them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import PROGRAMS, Hosts, missing
from tests.cluster.slurm import PROGRAMS as SLURM_PROGRAMS
from tests.cluster.slurm import Slurm
from tests.cluster.training import Recipe


@pytest.fixture(scope="session")
def shared() -> Iterator[Path]:
    """A folder that every host sees; sshd and munge want one that others cannot write into."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def hosts(shared: Path) -> Iterator[Hosts]:
    """node1, node2 and node3."""
    if (why := missing(PROGRAMS)) is not None:
        pytest.skip(why)
    with Hosts(3, shared / "hosts") as made:
        yield made


@pytest.fixture(scope="session")
def slurm(hosts: Hosts, shared: Path) -> Iterator[Slurm]:
    """All three hosts under one SLURM."""
    if (why := missing(SLURM_PROGRAMS)) is not None:
        pytest.skip(why)
    with Slurm(hosts, shared / "slurm") as made:
        yield made


@pytest.fixture(scope="session")
def recipe(hosts: Hosts, shared: Path) -> Recipe:
    return Recipe(shared / "recipe", hosts["node1"])
