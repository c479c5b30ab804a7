"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.placement.hf_trainer import forget_earlier_trainers
from tests.trainers import bench

pytest.importorskip("trl", reason="TRL is not installed (the extra trl)")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model with a tokenizer."""
    return bench.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Trainers of a process share accelerate's state."""
    forget_earlier_trainers()
    yield
    forget_earlier_trainers()
