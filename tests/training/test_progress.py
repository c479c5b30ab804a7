"""What a run knows of its way: which checkpoint is its best, which one the adapter is taken from, which steps counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_subspace.run_folder import RunFolder
from dist_subspace.training.progress import Progress, best_in_run
from dist_subspace.training.results import final_checkpoint

BEST = {"step": 4, "value": 1.0}


def plan(run: Path, resumed: Path | None = None, step: int = 0) -> Any:
    return SimpleNamespace(
        run_dir=RunFolder(run), checkpoint=None if resumed is None else (resumed, SimpleNamespace(step=step))
    )


def test_the_best_is_remembered_where_its_folder_lies_in_this_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.checkpoint(4).mkdir(parents=True)
    assert best_in_run(run, run.checkpoint(8), BEST) == BEST
    assert best_in_run(run, tmp_path / "run" / ".." / "run" / "checkpoint-8", BEST) == BEST
    assert best_in_run(run, tmp_path / "other" / "checkpoint-8", BEST) is None
    assert best_in_run(run, run.checkpoint(8), {"step": 6}) is None
    assert best_in_run(run, run.checkpoint(8), None) is None


@pytest.mark.parametrize(
    ("best", "resumed", "expected"),
    [
        (None, None, "run/checkpoint-9"),
        (BEST, None, "run/checkpoint-4"),
        (None, ("other/checkpoint-9", 9), "other/checkpoint-9"),  # no step was left to make
        (None, ("other/checkpoint-5", 5), "run/checkpoint-9"),
        (BEST, ("other/checkpoint-9", 9), "run/checkpoint-4"),
    ],
)
def test_the_adapter_is_taken_from_the_best_checkpoint_or_else_the_last(
    tmp_path: Path, best: Any, resumed: Any, expected: str
) -> None:
    folder = None if resumed is None else tmp_path / resumed[0]
    made = plan(tmp_path / "run", folder, 0 if resumed is None else resumed[1])
    assert final_checkpoint(made, Progress(step=9, best=best)) == tmp_path / expected


def test_steps_that_changed_nothing_are_counted_and_time_goes_on_from_before() -> None:
    progress = Progress(step=9, skipped=2, overflowed=3, elapsed_before=100.0)
    assert progress.not_applied == 5
    assert 100.0 <= progress.elapsed < 160.0
    progress.began -= 50
    assert progress.elapsed >= 150.0
