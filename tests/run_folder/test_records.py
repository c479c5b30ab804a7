"""The lines of metrics.jsonl as a reader finds them: whole ones alone, and numbers that may be absent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.run_folder.metrics import evaluation_lines, read_lines, training_lines
from dist_subspace.run_folder.records import Evaluation, StepRecord


def test_a_line_that_is_cut_or_is_no_record_is_left_out(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0}', "", "[1]", '{"loss": 1.0}', '{"step": "2"}', '{"step": 3, "eval_loss": 1.5}']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"step": 4, "lo\xff')
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 3]
    assert read_lines(tmp_path / "elsewhere") == []


def test_lines_are_of_training_or_of_evaluation() -> None:
    lines: list[dict[str, Any]] = [{"step": 1, "loss": None}, {"step": 2, "eval_loss": 1.0}, {"step": 3, "other": 1}]
    assert [line.step for line in training_lines(lines)] == [1]
    assert [line.step for line in evaluation_lines(lines)] == [2]


@pytest.mark.parametrize("value", [None, "1", True])
def test_what_is_no_number_is_not_known(value: Any) -> None:
    record = StepRecord.of_line({"step": 1, "loss": value, "grad_norm": value})
    assert math.isnan(record.loss) and record.grad_norm is None and record.tokens is None
    assert math.isnan(Evaluation(1, {"eval_loss": value}).loss) and math.isnan(Evaluation(1, {}).loss)
    assert StepRecord.of_line({"step": 1, "loss": 2, "grad_norm": 2}).grad_norm == 2.0
