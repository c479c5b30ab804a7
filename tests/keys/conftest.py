"""One bench for all keys of a section."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.keys.bench import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder: Path = tmp_path_factory.mktemp("keys")
    return Bench(folder)
