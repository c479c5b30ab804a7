"""What a run does not continue is moved away whole, under its names, and said; nothing is deleted, nothing moved needlessly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_subspace.checkpoint.set_aside import set_aside_others
from dist_subspace.checkpoint.store import newest_whole, purge, remove_leftovers, write_checkpoint
from dist_subspace.run_folder import RunFolder
from dist_subspace.run_folder.manifest import verify


def write(run: Path, *steps: int) -> None:
    """A run that has gone so far: checkpoints, metrics, an adapter."""
    for step in steps:
        write_checkpoint(run, step, lambda folder, step=step: (folder / "state").write_text(str(step)) and None)  # type: ignore[misc]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, steps[-1] + 2))
    )
    (run / "config.yaml").write_text("old: true")
    (run / "adapter").mkdir()


def names(folder: Path | None) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder is not None else set()


def test_newer_checkpoints_than_the_one_that_is_continued_from_are_moved_with_their_metrics_and_adapter(
    tmp_path: Path,
) -> None:
    write(tmp_path, 2, 4, 6)
    said: list[str] = []
    folder = set_aside_others(tmp_path, 2, tmp_path / "checkpoint-2", False, said.append)
    assert names(folder) == {"checkpoint-4", "checkpoint-6", "adapter", "metrics.jsonl", "config.yaml"}
    assert folder is not None and folder.name.startswith("set-aside-2-")
    assert list(RunFolder(tmp_path).checkpoints()) == [2] and (tmp_path / "metrics.jsonl").exists()
    assert verify(folder / "checkpoint-6") is None and (folder / "checkpoint-6" / "state").read_text() == "6"
    assert len(said) == 1 and "checkpoint-4, checkpoint-6" in said[0] and str(folder) in said[0]


def test_a_run_that_goes_on_from_its_newest_checkpoint_moves_nothing(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    before = names(tmp_path)
    assert set_aside_others(tmp_path, 4, tmp_path / "checkpoint-4", False, pytest.fail) is None
    assert names(tmp_path) == before
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "metrics.jsonl").write_text(
        '{"step": 1}\n'
    )  # before its first checkpoint: its steps come again
    assert set_aside_others(tmp_path / "killed", 0, None, False, pytest.fail) is None


def test_the_newest_checkpoint_is_the_runs_own_however_its_place_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", 2, 4)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for resumed in ("run/checkpoint-4", "run/../run/checkpoint-4", "link/checkpoint-4"):
        assert set_aside_others(tmp_path / "run", 4, Path(resumed), False, pytest.fail) is None
    assert list(RunFolder(tmp_path / "run").checkpoints()) == [2, 4]


@pytest.mark.parametrize("case", ["none", "another run's", "the adapter alone"])
def test_of_a_history_that_is_not_continued_at_all_nothing_stays(case: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, 2, 4)
    resumed = tmp_path / "other" / "checkpoint-3" if case == "another run's" else None
    if case == "the adapter alone":
        purge(run, 0)
        for path in RunFolder(run).checkpoints().values():
            path.rename(tmp_path / path.name)
    folder = set_aside_others(run, 3 if resumed else 0, resumed, case == "none", [].append)
    kept = set() if case == "the adapter alone" else {"checkpoint-2", "checkpoint-4"}
    assert names(folder) == kept | {"adapter", "metrics.jsonl", "config.yaml"}
    assert (
        RunFolder(run).checkpoints() == {} and not (run / "metrics.jsonl").exists() and (run / "config.yaml").exists()
    )


def test_a_damaged_checkpoint_is_set_aside_too_and_two_starts_in_a_second_have_a_folder_each(tmp_path: Path) -> None:
    folders = []
    for _ in range(2):
        write_checkpoint(tmp_path, 3, lambda folder: (folder / "state").write_text("3") and None)  # type: ignore[arg-type,return-value]
        (tmp_path / "checkpoint-3" / "state").write_text("damaged")
        assert newest_whole(tmp_path, [].append) is None
        folders.append(set_aside_others(tmp_path, 0, None, False, [].append))
    assert folders[0] != folders[1] and all(names(folder) == {"checkpoint-3"} for folder in folders)


def test_what_is_set_aside_is_never_found_purged_or_cleared_away(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    folder = set_aside_others(tmp_path, 0, None, True, [].append)
    before = names(folder)
    write(tmp_path / "new", 1)
    for path in (tmp_path / "new").iterdir():
        path.rename(tmp_path / path.name)
    assert newest_whole(tmp_path, pytest.fail) == tmp_path / "checkpoint-1"
    assert purge(tmp_path, 1) == [] and remove_leftovers(tmp_path) == [] and names(folder) == before


def test_a_checkpoint_between_two_renames_is_moved_under_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    (tmp_path / "checkpoint-4").rename(tmp_path / ".checkpoint-4.replaced")
    folder = set_aside_others(tmp_path, 2, tmp_path / "checkpoint-2", False, [].append)
    assert "checkpoint-4" in names(folder)
