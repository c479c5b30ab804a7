"""metrics.jsonl is valid JSON line by line, and a resumed run writes no step twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.atomic_files import StorageError
from dist_subspace.report.history import METRICS, evaluation_lines, number, read_lines, training_lines
from dist_subspace.training.metrics import KEYS, MetricsWriter


def record(step: int, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(KEYS, 1.0) | {"step": step} | values


def test_lines_are_in_the_file_at_once_and_in_the_promised_order(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run")
    writer.step(dict(reversed(record(1).items())))
    line = (tmp_path / "run" / METRICS).read_text()
    assert line.endswith("\n") and tuple(json.loads(line)) == KEYS
    writer.evaluation(1, {"eval_loss": 2.0, "eval_f1": 0.5})
    assert read_lines(tmp_path / "run")[1] == {"step": 1, "eval_loss": 2.0, "eval_f1": 0.5}
    writer.close()


def test_a_line_with_other_keys_is_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="samples"):
        writer.step({key: value for key, value in record(1).items() if key != "samples"})
    with pytest.raises(ValueError, match="extra"):
        writer.step(record(1, extra=1))
    with pytest.raises(ValueError, match="eval_"):
        writer.evaluation(1, {"loss": 1.0})
    writer.close()
    assert (tmp_path / METRICS).read_text() == ""


def test_a_number_that_json_lacks_becomes_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(record(1, loss=float("nan"), grad_norm=float("inf")))
    writer.close()
    text = (tmp_path / METRICS).read_text()
    assert "NaN" not in text and "Infinity" not in text
    line = json.loads(text)
    assert line["loss"] is None and line["grad_norm"] is None and number(line, "loss") != number(line, "loss")


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    for step in range(1, 6):
        first.step(record(step))
        first.evaluation(step, {"eval_loss": 1.0})
    first.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "loss": 1.')  # the process was killed here
    second = MetricsWriter(tmp_path, resume_step=3)
    assert second.last == {"step": 3, "eval_loss": 1.0}
    for step in (4, 5, 6):
        second.step(record(step, loss=2.0))
    second.close()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in training_lines(lines)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluation_lines(lines)] == [1, 2, 3]
    assert training_lines(lines)[3]["loss"] == 2.0


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 0, "eval_loss": 1.0}\n')
    MetricsWriter(tmp_path).close()
    assert read_lines(tmp_path) == []


def test_what_is_no_line_is_passed_over(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "absent") == []
    (tmp_path / METRICS).write_bytes(b'[1]\n{"loss": 1}\n\xff\xfe\n{"step": 2, "loss": 3}\n{"st')
    assert read_lines(tmp_path) == [{"step": 2, "loss": 3}]


def test_a_disk_that_refuses_a_line_is_one_sentence(tmp_path: Path) -> None:
    """The kernel's own refusal: a limit on the size of files, below that of one line."""
    resource = pytest.importorskip("resource")
    writer, before = MetricsWriter(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(StorageError, match=r"metrics\.jsonl could not be written \(File too large; .* MiB free\)"):
            writer.step(record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
