"""What the tests of this folder share: a tiny model, its data, and a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.rate_search.searches import configuration
from tests.tiny_run import make_model, make_records


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`config.yaml` trains LoRA on one process; its run, `run`, is not made."""
    folder = tmp_path_factory.mktemp("rates")
    make_model(folder / "model", layers=1)
    make_records(folder / "train.jsonl", 30)
    make_records(folder / "eval.jsonl", 7)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration(folder, "run")))
    return folder
