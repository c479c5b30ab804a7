"""Real launchers on real files: a run, and a refusal each; every rank leaves, and rank 0 alone speaks. (A process without a
launcher: tests/test_cli.py, tests/training/test_histories.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_subspace.run_folder.manifest import verify
from dist_subspace.run_folder.status import read_status
from tests.ranks import ROOT, free_port
from tests.tiny_run import make_model, make_records

TRAIN = str(ROOT / "launch" / "train.py")


def launcher(name: str) -> list[str]:
    programs = Path(sys.executable).parent
    if name == "deepspeed":
        program = [str(programs / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
        return [sys.executable, *program]
    if name == "torchrun":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(free_port()),
        ]
    raise ValueError(name)


def launch(name: str, config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return subprocess.run(
        [*launcher(name), TRAIN, str(config), *overrides],
        capture_output=True,
        text=True,
        timeout=480,
        env=environment,
        cwd=config.parent,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_model(tmp_path / "model")
    make_records(tmp_path / "train.jsonl", 40)
    file = tmp_path / "config.yaml"
    values = {
        "model": {"path": "model", "storage": "nf4"},
        "subspace": {"method": "lora", "rank": 4},
        "data": {"train": "train.jsonl", "max_length": 64, "eval": 0.1},
        "training": {"max_steps": 6, "global_batch_size": 6, "per_device_train_batch_size": 2, "learning_rate": 0.01},
        "run": {"output_dir": "run", "logging_steps": 1, "report_to": ["tensorboard"]},
    }
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_run_under_each_launcher_trains_and_leaves_a_whole_run_directory(name: str, config: Path) -> None:
    done = launch(name, config)
    assert done.returncode == 0, done.stdout + done.stderr
    run = config.parent / "run"
    assert read_status(run)["state"] == "finished"  # type: ignore[index]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert verify(run / "checkpoint-6") is None
    assert (run / "loss.png").stat().st_size > 1000
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= {
        path.name for path in (run / "adapter").iterdir()
    }
    assert done.stdout.count("finished after step 6") == 1  # rank 0 alone


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("deepspeed", "training.learning_rat=1", ["training.learning_rat", "learning_rate"]),
        ("torchrun", "subspace.rank=99", ["subspace.rank is 99", "at most 16"]),
    ],
)
def test_bad_input_under_a_launcher_is_one_sentence_and_nobody_is_left_waiting(
    name: str, override: str, words: list[str], config: Path
) -> None:
    done = launch(name, config, override)
    assert done.returncode != 0
    sentences = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, done.stdout + done.stderr
    assert all(word in sentences[0] for word in words)
    assert "dist_subspace/training/run.py" not in done.stderr  # no traceback of ours
    if "learning_rat" not in override:
        assert read_status(config.parent / "run")["state"] == "refused"  # type: ignore[index]
