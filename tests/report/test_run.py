"""The report of a run says what became of it, in whatever state its folder is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_subspace.checkpoint.store import write_checkpoint
from dist_subspace.errors import UsageError
from dist_subspace.report.run import run_report
from dist_subspace.run_folder.metrics import MetricsWriter
from dist_subspace.run_folder.records import Evaluation
from dist_subspace.run_folder.status import write_status
from tests.step_records import step_record, unknown_record


def fill(folder: Path) -> None:
    (folder / "a").write_bytes(b"x" * 2048)


def test_a_run_is_summed_up(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step, loss in ((1, 4.0), (2, float("nan")), (3, 1.5), (4, 2.0)):
        values = {
            "tokens_per_second": 1000.0 * step,
            "peak_memory_bytes": (3 if step == 2 else 1) << 30,
            "tokens": 500,
            "epoch": 0.5,
        }
        writer.write(step_record(step, loss=loss, elapsed_seconds=61.0, **values))
    writer.write(Evaluation(2, {"eval_loss": 3.0}))
    writer.write(Evaluation(4, {"eval_loss": 3.5, "eval_accuracy": 0.25}))
    writer.close()
    write_status(tmp_path, "interrupted", "signal SIGTERM", step=4)
    for step in (2, 4):
        write_checkpoint(tmp_path, step, fill)
    (tmp_path / "checkpoint-4" / "a").write_bytes(b"")
    text = run_report(tmp_path)
    for part in (
        "interrupted at step 4",
        "signal SIGTERM",
        "first 4.0000 (step 1), last 2.0000 (step 4), best 1.5000 (step 3)",
        "1 of 4 logged steps",
        "3,000 tokens/s (median)",
        "3.0 GiB (largest rank)",
        "500 tokens in 1:01",
        "at step 4: loss 3.5000, accuracy 0.2500",
        "best 3.0000 (step 2)",
    ):
        assert part in text, part
    lines = text.splitlines()
    assert any("checkpoint-2" in line and "2.1 KiB" in line and line.endswith("whole") for line in lines)
    assert any("checkpoint-4/a has 0 bytes" in line for line in lines)


def test_who_was_at_fault_what_is_doubtful_and_where_the_adapter_lies_is_said(tmp_path: Path) -> None:
    write_status(tmp_path, "failed", "out of memory", step=1200, rank=3)
    (state,) = (line for line in run_report(tmp_path).splitlines() if line.startswith("state"))
    assert "failed at step 1,200 on rank 3 (" in state and state.endswith("): out of memory")
    assert str(tmp_path / "adapter") not in run_report(tmp_path)
    (tmp_path / "adapter").mkdir()
    write_status(tmp_path, "finished", step=5, warning="the run diverged", skipped=0)
    text = run_report(tmp_path)
    assert "finished at step 5 (" in text and "): the run diverged\n" in text and " on rank " not in text
    assert text.splitlines()[-1].split() == ["adapter", str(tmp_path / "adapter")]


def test_a_run_that_has_only_begun_is_reported(tmp_path: Path) -> None:
    write_status(tmp_path, "running")
    assert "no step was logged" in run_report(tmp_path) and "running" in run_report(tmp_path)


def test_a_run_whose_loss_was_never_finite_is_reported(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(unknown_record(1))
    writer.close()
    text = run_report(tmp_path)
    assert "1 of 1 logged steps" in text and "unknown (no status.json)" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run"):
        run_report(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        run_report(tmp_path / "absent")
