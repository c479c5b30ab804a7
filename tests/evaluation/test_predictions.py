"""A file of results that was cut anywhere is gone on with, and holds in the end what it would have held."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.evaluation import measurements, measuring
from dist_subspace.evaluation.predictions import Predictions
from tests.evaluation.runs import evaluated, refused, write_figures
from tests.forked_ranks import report, run_ranks

OF = {"data": "x", "metrics": ["loss"]}


def test_whole_lines_are_kept_and_a_cut_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.jsonl"
    lines = Predictions(file, OF)
    lines.write([{"text": "ä"}, {"text": "b\n"}])
    lines.close()
    whole = file.read_bytes()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        again = Predictions(file, OF)
        assert again.lines == [{"text": "ä"}, {"text": "b\n"}][: whole[:end].count(b"\n")]
        again.keep(len(again.lines))
        again.write([{"text": "c"}])
        again.close()
        assert [json.loads(line) for line in file.read_text().splitlines()] == again.lines


def test_the_results_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    Predictions(file, OF).close()
    with pytest.raises(UsageError, match=r"results of another evaluation \(data was 'x', and is 'y'\)"):
        Predictions(file, OF | {"data": "y"})
    (tmp_path / "results.jsonl.about.json").unlink()
    with pytest.raises(UsageError, match="which is there already"):
        Predictions(file, OF)


def test_a_half_measured_file_is_gone_on_with(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measurements, measuring):
        monkeypatch.setattr(module, "BLOCK", 2)
    file = tmp_path / "results.jsonl"
    arguments = (home / "run", "--compare-base", "--predictions", file)
    expected = evaluated(*arguments)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 14  # 7 of the adapter, 7 of the base
    made = _counted(monkeypatch)
    # Within the fourth line, of the second block; behind the adapter's last; within the base's.
    for kept, blocks in ((b"".join(lines[:3]) + lines[3][:9], 3 + 4), (b"".join(lines[:7]), 4), (whole[:-3], 1)):
        file.write_bytes(kept)
        made.clear()
        assert evaluated(*arguments) == expected
        assert (file.read_bytes(), len(made)) == (whole, blocks)
    made.clear()
    assert evaluated(*arguments) == expected and not made
    assert "results of another evaluation" in refused(home / "run", "--predictions", file)


def told_to_stop(rank_told: str, file: str, *arguments: str) -> None:
    """One of the ranks gets a signal while the second block is measured."""
    for module in (measurements, measuring):
        module.BLOCK = 2
    before, blocks = measurements.OfSamples.results, []

    def results(self: measurements.OfSamples, model: object, numbers: range) -> list[dict[str, object]]:
        blocks.append(numbers)
        if len(blocks) == 2 and os.environ["RANK"] == rank_told:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, model, numbers)

    measurements.OfSamples.results = results  # type: ignore[method-assign]
    write_figures(file, *arguments)


def test_ranks_that_are_told_to_stop_leave_whole_blocks(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (str(tmp_path / "figures"), str(home / "run"), "--predictions", str(tmp_path / "results.jsonl"))
    ended = run_ranks([(told_to_stop, "1", *arguments)] * 2, tmp_path)
    assert [rank.status for rank in ended] == [75, 75], report(ended)
    assert "interrupted by signal SIGTERM; run the same command to go on" in ended[0].output
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(measurements, "BLOCK", 2)
    monkeypatch.setattr(measuring, "BLOCK", 2)
    assert evaluated(*arguments[1:]) == evaluated(home / "run")


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each block that is measured from now on."""
    made: list[int] = []
    before = measurements.OfSamples.results

    def counted(self: measurements.OfSamples, model: object, numbers: range) -> list[dict[str, object]]:
        made.append(len(numbers))
        return before(self, model, numbers)

    monkeypatch.setattr(measurements.OfSamples, "results", counted)
    return made
