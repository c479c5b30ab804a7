"""What a path means, and what its files say about how prompts are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import dist_subspace as dsub
from dist_subspace.adapted.source import find_source
from dist_subspace.errors import UsageError
from tests.interchange.trained import trained
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dsub.save_adapter(trained(tiny_model()), tmp_path_factory.mktemp("adapter") / "adapter")


def test_a_run_says_how_its_prompts_are_written_and_what_is_given_wins(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    data = {"format": "alpaca", "template": "{instruction}", "instruction_field": "ask", "train": "x", "max_length": 9}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    (run / "adapter").mkdir()
    for file in adapter.iterdir():
        (run / "adapter" / file.name).write_bytes(file.read_bytes())
    settings = find_source(run).settings()
    assert (settings.format, settings.template, settings.column("instruction")) == ("alpaca", "{instruction}", "ask")
    assert find_source(run / "adapter").settings() == settings
    assert find_source(run).settings(template="Q {instruction}").template == "Q {instruction}"
    other = find_source(run).settings(format="completion")
    assert (other.format, other.template) == ("completion", None), "a template of another format says nothing here"


def test_an_adapter_alone_says_what_its_run_has_written_into_it_or_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"does not say how its prompts are written; accepted: a run, or a format \(--format\)"
    ):
        find_source(adapter).settings()
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in adapter.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    own = json.loads((alone / "dist_subspace.json").read_text()) | {
        "prompts": {"format": "chat", "messages_field": "talk"}
    }
    (alone / "dist_subspace.json").write_text(json.dumps(own))
    settings = find_source(alone).settings()
    assert settings.format == "chat" and settings.column("messages") == "talk"


def test_a_run_without_an_adapter_yet_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no adapter; looked for"):
        find_source(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        find_source(tmp_path / "none")
