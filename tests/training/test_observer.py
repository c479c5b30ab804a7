"""What is logged is of all steps since the last logged one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_subspace.run_folder.metrics import MetricsWriter, read_lines
from dist_subspace.training.display import Display
from dist_subspace.training.observer import FinishedStep, Observer


def finished(step: int, loss: float, tokens: int, seconds: float) -> FinishedStep:
    return FinishedStep(
        step=step,
        epoch=0.5,
        samples=8 * step,
        tokens=1000 * step,
        elapsed_seconds=2.5 * step,
        loss=loss,
        penalty=0.25,
        learning_rate=1e-4,
        grad_norm=None,
        own_tokens=tokens,
        own_seconds=seconds,
    )


def test_a_line_has_the_mean_loss_since_the_line_before_and_the_speed_over_that_time(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    observer = Observer(Display(enabled=False, total_steps=4), MetricsWriter(tmp_path), None, torch.device("cpu"))
    observer.reached = lambda step, facts: seen.append((step, facts["total_steps"], facts["loss"]))
    for step, loss, tokens, seconds in (
        (1, 4.0, 100, 1.0),
        (2, 2.0, 100, 2.0),
        (3, 3.0, 400, 4.0),
        (4, 7.0, 10, 0.5),
    ):
        observer.step(finished(step, loss, tokens, seconds), logged=step in (3, 4))
    observer.close()
    first, second = read_lines(tmp_path)
    assert (first["step"], first["loss"]) == (3, 3.0) and first["tokens_per_second"] == pytest.approx(600 / 7)
    assert (second["step"], second["loss"]) == (4, 7.0) and second["tokens_per_second"] == pytest.approx(20.0)
    assert second["peak_memory_bytes"] > 1 and seen == [(1, 4, 4.0), (2, 4, 2.0), (3, 4, 3.0), (4, 4, 7.0)]
    other = {"epoch": 0.5, "samples": 24, "tokens": 3000, "elapsed_seconds": 7.5, "learning_rate": 1e-4}
    assert first | other | {"penalty": 0.25, "grad_norm": None} == first


def test_what_was_not_logged_when_a_run_stops_early_gets_its_line(tmp_path: Path) -> None:
    observer = Observer(Display(enabled=False, total_steps=9), MetricsWriter(tmp_path), None, torch.device("cpu"))
    for step in (1, 2, 3):
        observer.step(finished(step, float(step), 10, 1.0), logged=step == 1)
    observer.log()
    observer.log()
    observer.close()
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [(1, 1.0), (3, 2.5)]
