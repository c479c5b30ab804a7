"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_run import make_model, make_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 60 records, of which the configuration in tests/whole_runs.py makes a run."""
    path = tmp_path_factory.mktemp("runs")
    make_model(path / "model")
    make_records(path / "train.jsonl", 60)
    return path


@pytest.fixture
def fp16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies float16 on a CPU, slowly; DeepSpeed refuses its fp16 engine there, and works where it does not."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
