"""What was found is a table, a sentence, a line that `train` takes, and files that say the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dist_subspace.config import load_config
from dist_subspace.rate_search.bench import Tried
from dist_subspace.rate_search.results import FoundRate, print_found, write_found


def found(folder: Path, rate: float | None = 1e-2, edge: str | None = None) -> FoundRate:
    dropped = Tried(1e-3, [2.0, 1.9], {2: {"eval_loss": 1.8}}, "not among the best 2 of 3")
    best = Tried(1e-2, [2.0, 1.5, 1.2, 1.0], {2: {"eval_loss": 1.4}, 4: {"eval_loss": 0.9}})
    wild = Tried(0.1, [2.0, math.nan], {}, "diverged: step 2 was not finite", True)
    return FoundRate(
        rate, 1e-2, 2.0, [2, 4], [dropped, best, wild], edge, 61.0, folder, {"model": "m", "method": "ssb"}
    )


def test_the_line_is_one_that_train_takes(tmp_path: Path) -> None:
    line = found(tmp_path).line
    assert line == "training.learning_rate=1.0e-2"
    config = load_config({"model": {"path": "m"}, "data": {"train": "t.jsonl"}}, [line])
    assert config.training.learning_rate == 1e-2


def test_the_table_has_every_rate_and_why_it_did_not_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_found(found(tmp_path), [Path("a.json")])
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    assert rows == [
        ["1.0e-3", "2", "1.9500", "1.8000", "not among the best 2 of 3"],
        ["1.0e-2 *", "4", "1.4250", "0.9000", "best"],
        ["1.0e-1", "2", "nan", "-", "diverged: step 2 was not finite"],
    ]
    assert "best: 1.0e-2, held-out loss 0.9000 after 4 steps (before training 2.0000)" in shown
    assert "\ntraining.learning_rate=1.0e-2\n" in shown and "written in 1:01: a.json" in shown


def test_an_end_and_a_search_in_vain_are_said(tmp_path: Path) -> None:
    assert found(tmp_path, edge="upper").verdict.endswith(
        "it lies at the upper end of all rates, and a higher one may be better"
    )
    assert found(tmp_path, edge="lower").verdict.endswith(
        "it lies at the lower end of all rates, and a lower one may be better"
    )
    close = found(tmp_path)
    close.tried[0].evaluations[4] = {"eval_loss": 0.905}
    assert close.verdict.endswith("; 1.0e-3 comes within 1 % of it, and is the safer one for a long run")
    close.tried[0].evaluations[4] = {"eval_loss": 0.91}
    assert "within 1 %" not in close.verdict
    nothing = found(tmp_path, rate=None)
    assert nothing.line is None and nothing.verdict.startswith(
        "no rate has lowered the held-out loss, which is 2.0000 before"
    )


def test_files_hold_the_same_and_a_number_that_is_none_is_null(tmp_path: Path) -> None:
    result, picture = write_found(found(tmp_path / "new"))
    told = json.loads(result.read_text())
    assert (told["learning_rate"], told["line"], told["rungs"]) == (1e-2, "training.learning_rate=1.0e-2", [2, 4])
    assert [tried["learning_rate"] for tried in told["tried"]] == [1e-3, 1e-2, 0.1]
    assert told["tried"][2]["losses"] == [2.0, None] and told["tried"][2]["diverged"]
    assert told["tried"][1]["evaluations"] == [{"step": 2, "eval_loss": 1.4}, {"step": 4, "eval_loss": 0.9}]
    assert picture.read_bytes().startswith(b"\x89PNG")
