"""Lines of metrics.jsonl for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dist_subspace.run_folder.records import StepRecord


def step_record(step: int, **values: Any) -> StepRecord:
    """A training line whose other values are 1."""
    one = StepRecord(step, 1.0, 1, 1, 1.0, 1.0, 1.0, 1.0, 1, 1.0)
    return replace(one, **values)


def unknown_record(step: int, **values: Any) -> StepRecord:
    """A training line with a loss that was not finite, of which nothing else is known."""
    return StepRecord.of_line({"step": step, "loss": None, **values})
