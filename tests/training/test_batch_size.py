"""Data that is smaller than a global batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.training.run import train
from tests.tiny_run import make_model, make_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    make_model(path / "model")
    make_records(path / "train.jsonl", 30)
    return path


def configuration(folder: Path, run: Path, size: int | None, steps: int = 2) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32"},
        "subspace": {"method": "lora", "rank": 2},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 128},
        "training": {"max_steps": steps, "global_batch_size": size, "per_device_train_batch_size": 2},
        "deepspeed": {"preset": "zero0"},
        "checkpoint": {"save_steps": 2},
        "run": {"output_dir": str(run), "logging_steps": 1, "report_to": "none"},
    }


def test_a_batch_that_the_data_does_not_fill_is_refused_with_the_largest_that_it_does(
    folder: Path, tmp_path: Path
) -> None:
    assert train(configuration(folder, tmp_path / "refused", 64)) == EXIT_USAGE
    said = read_status(tmp_path / "refused")["message"]  # type: ignore[index]
    assert said.endswith("or null for all of them") and "packed rows; accepted: at most " in said
    largest = int(said.split("at most ")[1].split(",")[0])
    assert train(configuration(folder, tmp_path / "largest", largest)) == EXIT_OK
    assert train(configuration(folder, tmp_path / "above", largest + 2)) == EXIT_USAGE


def test_null_is_all_rows_is_written_as_a_number_and_goes_on_after_a_stop(folder: Path, tmp_path: Path) -> None:
    assert train(configuration(folder, tmp_path / "run", None, steps=4)) == EXIT_OK
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["global_batch_size"]
    assert isinstance(written, int) and written % 2 == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 27 <= lines[0]["samples"] <= 30 and 0.9 < lines[0]["epoch"] <= 1
    assert train(configuration(folder, tmp_path / "same", written, steps=4)) == EXIT_OK
    shutil.rmtree(tmp_path / "same" / "checkpoint-4")
    assert train(configuration(folder, tmp_path / "same", None, steps=4)) == EXIT_OK
    one, other = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "same"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_cut_is_said_before_the_first_step_and_much_of_it_as_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for length, warns in ((128, False), (44, True)):
        config = configuration(folder, tmp_path / str(length), 2)
        config["data"] |= {"max_length": length}
        assert train(config) == EXIT_OK
        shown = " ".join(capsys.readouterr().out.split())
        assert ("warning: data.max_length 44 cuts" in shown.partition("step 1/")[0]) == warns
        assert ("would keep 95% of them whole" in shown) == warns
