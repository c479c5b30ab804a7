"""The quickstart's parts: what it prepares is whole, and its held-out samples are really held out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

PREPARE = ROOT / "launch" / "quickstart" / "prepare.py"


def prepare(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(PREPARE), str(folder), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_without_data_a_model_and_a_task_are_made_here(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "made"
    prepare(folder, "--steps", "2")
    train, heldout = rows(folder / "train.jsonl"), rows(folder / "heldout.jsonl")
    assert len(train) > 1000
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert len({row["completion"] for row in heldout}) > 5
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = tokenizer(heldout[0]["prompt"])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == heldout[0]["prompt"]
    assert max(ids) < model.config.vocab_size
    assert "is there already" in prepare(folder, "--steps", "2")


def test_with_data_answers_end_with_a_token_that_the_model_knows(tmp_path: Path, data_dir: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "made"
    prepare(folder, "--data", str(data_dir))
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token == "<s>"
    assert json.loads((folder / "model" / "config.json").read_text())["eos_token_id"] == 1
    train, heldout = rows(folder / "train.jsonl"), rows(folder / "heldout.jsonl")
    assert len(heldout) == 120
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in heldout}


@pytest.mark.parametrize("script", ["environment.sh", "test.sh", "quickstart.sh"])
def test_scripts_are_valid_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "launch" / script)]).returncode == 0


def test_constraints_pin_every_requirement() -> None:
    import configparser
    import re

    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    lists = [options["options"]["install_requires"], *options["options.extras_require"].values()]
    wanted = {
        re.split(r"[<>=\[]", line)[0].lower().replace("_", "-")
        for text in lists
        for line in text.splitlines()
        if line and not line.startswith("#")
    }
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert wanted - pinned == set()
