"""Runs of tiny models, and evaluations of them as a user starts them."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import transformers

from dist_subspace.cli import main
from dist_subspace.training.run import train
from tests.tiny_run import make_bert

CLASSES = ("a", "b", "c")


def write_bert(folder: Path) -> None:
    make_bert(folder, transformers.BertForMaskedLM)


def trained_run(
    folder: Path,
    run: Path,
    data: dict[str, Any],
    model: dict[str, Any] | None = None,
    targets: list[str] | None = None,
) -> dict[str, Any]:
    """Two steps at a high rate: the adapter is no longer the base. Returns the configuration."""
    config = {
        "model": {"path": str(folder / "model"), "storage": "fp32", **(model or {})},
        "subspace": {"method": "lora", "rank": 2, "target_modules": targets or ["q_proj", "v_proj"]},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 48, "packing": False, **data},
        "training": {
            "max_steps": 2,
            "global_batch_size": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
        },
        "deepspeed": {"preset": "none"},
        "checkpoint": {"save_steps": 2},
        "run": {"output_dir": str(run), "report_to": "none"},
    }
    with redirect_stdout(io.StringIO()):
        assert train(config) == 0
    return config


def evaluated(*arguments: object, status: int = 0) -> dict[str, Any]:
    """What `dist-subspace eval --json` prints."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        assert main(["eval", *map(str, arguments), "--json"]) == status, errors.getvalue()
    return json.loads(out.getvalue())  # type: ignore[no-any-return]


def refused(*arguments: object) -> str:
    """The one sentence of an evaluation that is refused."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        assert main(["eval", *map(str, arguments)]) == 2, errors.getvalue()
    sentences = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and not out.getvalue(), errors.getvalue()
    return sentences[0].removeprefix("error: ")


def write_figures(file: str, *arguments: str) -> None:
    """On one of several ranks: the evaluation's exit status, and what rank 0 prints, into a file of this rank's."""
    import os
    import sys

    out = io.StringIO()
    with redirect_stdout(out):
        status = main(["eval", *arguments, "--json"])
    Path(f"{file}.{os.environ['RANK']}").write_text(out.getvalue())
    sys.exit(status)
