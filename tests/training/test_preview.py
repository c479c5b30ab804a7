"""Data before a run: as the model will see them, counted as they are, and found by the run that comes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from dist_subspace.cli import main
from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.training.data import tokens
from dist_subspace.training.plan import make_plan
from dist_subspace.training.preview import prepare_run
from tests.hub_server import hub_server
from tests.ranks import ROOT
from tests.tiny_run import POSITIONS, make_model

LENGTHS = (3, 9, 9, 20, 41, 80)  # of the prompts; the last two are cut


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of these lengths with an answer of five characters, and one answer that is too long."""
    folder = tmp_path_factory.mktemp("preview")
    make_model(folder / "model", layers=1)
    (folder / "model" / "model.safetensors").write_bytes(b"no weight is read")
    records: list[dict[str, Any]] = [{"prompt": "p" * length, "completion": "hello"} for length in LENGTHS]
    records.append({"prompt": "p", "completion": "x" * 60})
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {
        "model": {"path": str(folder / "model"), "storage": "nf4"},
        "data": {"train": str(folder / "train.jsonl"), "format": "completion", "max_length": 40},
        "training": {"max_steps": 1, "global_batch_size": 1, "per_device_train_batch_size": 1},
        "run": {"output_dir": str(folder / "run"), "report_to": "none"},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def shown(config: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["preview", str(config), "-n", "4"]) == 0
    return out.getvalue()


def test_the_first_samples_are_shown_with_what_is_trained_between_marks(shown: str, config: Path) -> None:
    titles = re.findall(r"^-- sample \d+ \((\d+) tokens, (\d+) trained\)$", shown, re.MULTILINE)
    assert len(titles) == 4 and all(trained == "6" for _, trained in titles)
    samples = re.findall(r"^p*\[\[hello</s>\]\]$", shown, re.MULTILINE)
    assert len(samples) == 4
    for (length, _), text in zip(titles, samples, strict=True):
        assert int(length) == text.count("p") + 6


def test_counts_are_those_of_the_tokenizer(shown: str, config: Path) -> None:
    """transformers' own tokenizer counts; what is longer than 40 tokens is cut to 40."""
    tokenizer = AutoTokenizer.from_pretrained(config.parent / "model")
    whole = [len(tokenizer("p" * n + "hello", add_special_tokens=False).input_ids) + 1 for n in LENGTHS]
    kept = [min(length, 40) for length in whole]
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines() if line[:1].isalpha() and " " in line)
    assert rows["samples"] == f"6 with {sum(kept)} tokens, 36 of them trained ({100 * 36 / sum(kept):.1f}%)"
    assert (
        rows["lengths"].startswith(f"shortest {min(kept)}, median ")
        and f"longest {max(kept)} tokens" in rows["lengths"]
    )
    lost = sum(whole) - sum(kept)
    assert rows["cut"].startswith(f"data.max_length 40 cuts 2 of 7 samples (28.6%): they lose {lost} tokens")
    assert "1 of 7 samples (14.3%) are left out" in rows["cut"]
    assert rows["packing"].startswith("on: ") and "off: 6 rows, 100.0% of them tokens" in rows["packing"]
    packed = re.match(r"on: (\d+) rows of 40, ([\d.]+)% of them tokens", rows["packing"])
    assert packed and float(packed[2]) == pytest.approx(100 * sum(kept) / (40 * int(packed[1])), abs=0.06)
    bars = re.findall(r"^ *\d+ - *\d+ #* +(\d+)( longer than data.max_length)?$", shown, re.MULTILINE)
    assert sum(int(count) for count, _ in bars) == 7
    assert sum(int(count) for count, beyond in bars if beyond) == sum(length > 40 for length in (*whole, 61))


def test_what_is_prepared_is_what_the_run_finds(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fingerprint that a checkpoint keeps is that of the plan, and no record is tokenised again."""
    assert main(["prepare", str(config)]) == 0
    assert (
        f"6 samples, 145 tokens, in {config.parent / 'run' / 'tokens'}: the run finds them there"
        in capsys.readouterr().out
    )
    made = prepare_run(str(config), [])
    make_model(config.parent / "model", layers=1)  # the run needs the weights that were not there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "Tokenising", None)
        plan = make_plan(load_config(config), lambda sentence: None)
    assert plan.data.fingerprint == made.data.fingerprint


def test_a_length_that_nobody_gave_is_the_models_in_the_run_and_ahead_of_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(config.read_text())
    del values["data"]["max_length"]
    values["run"]["output_dir"] = str(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    made = prepare_run(str(file), [])
    assert made.materials.config.data.max_length == POSITIONS
    assert f"data.max_length is not given: it is {POSITIONS}" in capsys.readouterr().err
    assert make_plan(load_config(file), lambda sentence: None).data.fingerprint == made.data.fingerprint
    with pytest.raises(UsageError, match=rf"data.max_length is {POSITIONS + 1}; accepted: at most {POSITIONS}"):
        prepare_run(str(file), [f"data.max_length={POSITIONS + 1}"])


@pytest.mark.slow
def test_of_a_model_on_the_hub_no_weight_is_fetched(config: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(config.read_text())
    values["model"]["path"], values["run"]["output_dir"] = "some/model", str(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    with hub_server() as hub:
        hub.add("some/model", make_model(tmp_path / "model", layers=1))
        ended = subprocess.run(
            [sys.executable, "-m", "dist_subspace", "prepare", str(file)],
            **{"cwd": ROOT, "env": hub.environment(tmp_path / "home"), "capture_output": True, "text": True},
            timeout=120,
        )
        assert ended.returncode == 0 and "6 samples, 145 tokens" in ended.stdout, ended
        assert hub.asked("GET", "tokenizer.json") and not hub.asked("GET", "safetensors")
