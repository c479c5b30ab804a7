"""What is logged is of all steps since the last logged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace.report.history import read_lines
from dist_subspace.training.display import Display
from dist_subspace.training.metrics import KEYS, MetricsWriter
from dist_subspace.training.observer import Observer


def record(step: int, loss: float, speed: float) -> dict[str, Any]:
    return dict.fromkeys(KEYS, 1.0) | {"step": step, "loss": loss, "tokens_per_second": speed}


def test_a_line_has_the_mean_loss_since_the_line_before_and_the_speed_over_that_time(tmp_path: Path) -> None:
    seen: list[int] = []
    observer = Observer(Display(enabled=False, total_steps=4), MetricsWriter(tmp_path), None, torch.device("cpu"))
    observer.reached = seen.append
    for step, loss, tokens, speed in (
        (1, 4.0, 100, 100.0),
        (2, 2.0, 100, 50.0),
        (3, 3.0, 400, 100.0),
        (4, 7.0, 10, 20.0),
    ):
        observer.step(record(step, loss, speed), tokens, logged=step in (3, 4))
    observer.close()
    first, second = read_lines(tmp_path)
    assert (first["step"], first["loss"]) == (3, 3.0) and first["tokens_per_second"] == pytest.approx(600 / 7)
    assert (second["step"], second["loss"]) == (4, 7.0) and second["tokens_per_second"] == pytest.approx(20.0)
    assert second["peak_memory_bytes"] > 1 and seen == [1, 2, 3, 4]
