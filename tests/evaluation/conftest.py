"""What the tests of this folder share: runs of tiny models, trained once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.evaluation.runs import CLASSES, trained_run, write_bert
from tests.tiny_run import make_model, make_records


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, records, and `run`: a LoRA that has changed the model, whose data.eval is `eval.jsonl`; `config.yaml` is
    its configuration."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_model(folder / "model", layers=1)
    make_records(folder / "train.jsonl", 20)
    make_records(folder / "eval.jsonl", 7)
    config = trained_run(folder, folder / "run", data={"eval": str(folder / "eval.jsonl")})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`: a tiny BERT that classifies texts by their first letter, badly."""
    folder = tmp_path_factory.mktemp("classified")
    write_bert(folder / "model")
    rows = [{"text": f"{CLASSES[n % 3]} {n}", "label": CLASSES[n % 3]} for n in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[2:9], rows[1]]))
    data = {"eval": str(folder / "eval.jsonl"), "format": "classification"}
    trained_run(folder, folder / "run", data=data, model={"task": "classification"}, targets=["query"])
    return folder
