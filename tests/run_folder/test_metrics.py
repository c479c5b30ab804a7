"""metrics.jsonl is valid JSON line by line, and a resumed run writes no step twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dist_subspace.atomic_files import StorageError
from dist_subspace.run_folder.metrics import MetricsWriter, evaluation_lines, read_lines, training_lines
from dist_subspace.run_folder.records import Evaluation, StepRecord
from tests.step_records import step_record as record

METRICS = "metrics.jsonl"
KEYS = ("step", "epoch", "samples", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second")
KEYS += ("peak_memory_bytes", "elapsed_seconds")


def test_lines_are_in_the_file_at_once_and_in_the_promised_order(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run")
    writer.write(record(1))
    line = (tmp_path / "run" / METRICS).read_text()
    assert line.endswith("\n") and tuple(json.loads(line)) == KEYS
    writer.write(Evaluation(1, {"eval_loss": 2.0, "eval_f1": 0.5}))
    assert read_lines(tmp_path / "run")[1] == {"step": 1, "eval_loss": 2.0, "eval_f1": 0.5}
    writer.close()


def test_a_line_with_other_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="samples"):
        StepRecord(**{key: value for key, value in record(1).as_line().items() if key != "samples"})
    with pytest.raises(TypeError, match="extra"):
        record(1, extra=1)
    with pytest.raises(ValueError, match="eval_"):
        Evaluation(1, {"loss": 1.0})


def test_a_line_is_read_back_as_what_was_written(tmp_path: Path) -> None:
    writer, written = MetricsWriter(tmp_path), [record(1, penalty=0.25), record(2), Evaluation(2, {"eval_loss": 3.0})]
    for each in written:
        writer.write(each)
    writer.close()
    lines = read_lines(tmp_path)
    assert [*training_lines(lines), *evaluation_lines(lines)] == written
    assert [("penalty" in line) for line in lines] == [True, False, False]
    assert evaluation_lines(lines)[0].loss == 3.0 and evaluation_lines(lines)[0].figures == {"loss": 3.0}


def test_what_an_older_line_lacks_is_not_known() -> None:
    found = StepRecord.of_line({"step": 3, "loss": 2, "samples": True, "epoch": "1", "further": 1})
    assert (found.step, found.loss, found.samples, found.epoch, found.penalty) == (3, 2.0, None, None, None)


def test_a_number_that_json_lacks_becomes_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(record(1, loss=float("nan"), grad_norm=float("inf")))
    writer.close()
    text = (tmp_path / METRICS).read_text()
    assert "NaN" not in text and "Infinity" not in text
    line = json.loads(text)
    assert line["loss"] is None and line["grad_norm"] is None
    (read,) = training_lines(read_lines(tmp_path))
    assert math.isnan(read.loss) and read.grad_norm is None


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    for step in range(1, 6):
        first.write(record(step))
        first.write(Evaluation(step, {"eval_loss": 1.0}))
    first.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "loss": 1.')  # the process was killed here
    second = MetricsWriter(tmp_path, resume_step=3)
    assert read_lines(tmp_path)[-1] == {"step": 3, "eval_loss": 1.0}
    for step in (4, 5, 6):
        second.write(record(step, loss=2.0))
    second.close()
    lines = read_lines(tmp_path)
    assert [line.step for line in training_lines(lines)] == [1, 2, 3, 4, 5, 6]
    assert [line.step for line in evaluation_lines(lines)] == [1, 2, 3]
    assert training_lines(lines)[3].loss == 2.0


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
            writer.write(record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
