"""Runs with an adapter that is away from its start, without the seconds of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import dist_subspace as dsub
from tests.interchange.trained import frozen, trained
from tests.tiny_run import make_model


def run_folder(folder: Path, form: str = "alpaca", *, tokenizer: Any = None, method: str = "lora", **data: Any) -> Path:
    """RUN with its configuration and its adapter, in a format of `data.format`; the base lies beside it."""
    run = folder / "run"
    model = trained(frozen(make_model(folder / "model", layers=1)), method)
    dsub.save_adapter(model, run / "adapter", tokenizer=tokenizer)
    sections = {"model": {"path": str(folder / "model")}, "data": {"format": form, **data}}
    (run / "config.yaml").write_text(yaml.safe_dump(sections | {"deepspeed": {"preset": "zero3"}}))
    return run
