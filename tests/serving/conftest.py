"""What serves models for real: slow, and in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.serving.servers import PYTHON


@pytest.fixture(scope="session")
def serving_python() -> Path:
    """The interpreter of the servers' environment: DIST_SUBSPACE_SERVING_PYTHON."""
    named = os.environ.get(PYTHON)
    if named is None:
        pytest.skip(f"no servers: set {PYTHON} (tests/serving/environment.sh FOLDER makes an environment)")
    assert Path(named).is_file(), f"{PYTHON} is {named!r}, which is not there"
    return Path(named)
