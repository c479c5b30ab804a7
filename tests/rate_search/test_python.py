"""In a script a search returns what it has found, and raises what stands against it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

import dist_subspace as dsub
from dist_subspace.errors import UsageError


def test_python_gets_the_same_and_an_exception_for_a_refusal(home: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        config = home / "config.yaml"
        found = dsub.find_learning_rate(config, rates=[1e-3, 3e-2], steps=2, output=home / "python")
        with pytest.raises(UsageError, match=r"--rates is '0\.001'"):
            dsub.find_learning_rate(config, rates=[1e-3])
        with pytest.raises(RuntimeError, match="no rate has lowered the held-out loss"):
            dsub.find_learning_rate(config, rates=[1e4, 1e5], steps=6, output=home / "python")
    assert not any(tried.held for tried in found.tried) and found.line == "training.learning_rate=3.0e-2"
    assert found.rate == 3e-2 and [tried.rate for tried in found.tried] == [1e-3, 3e-2]
