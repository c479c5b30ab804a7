"""Served by the real vLLM: slow, and in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.serving.vllm_processes import PYTHON


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment: DIST_SUBSPACE_VLLM_PYTHON."""
    named = os.environ.get(PYTHON)
    if named is None:
        pytest.skip(f"no vLLM: set {PYTHON} (tests/serving/environment.sh FOLDER makes an environment)")
    assert Path(named).is_file(), f"{PYTHON} is {named!r}, which is not there"
    return Path(named)
