"""Rank 0's checkpoints are the newest that any rank sees, or the run is refused. Separate disks are separate paths here."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_subspace.checkpoint.elsewhere import refuse_newer_elsewhere
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import is_everyones, world
from dist_subspace.run_folder.folder import RunFolder
from tests.named_hosts import named_host
from tests.ranks import run_on_ranks


def asked(folders: list[Path], resume: str | None) -> str:
    run = RunFolder(folders[world().rank])
    with named_host(f"node{world().rank}"):
        try:
            refuse_newer_elsewhere(run, resume)
        except UsageError as error:
            assert is_everyones(error)
            return str(error)
    return "goes on"


def disk(folder: Path, *steps: int, whole: bool = True) -> Path:
    for step in steps:
        checkpoint = RunFolder(folder).checkpoint(step)
        checkpoint.mkdir(parents=True)
        if whole:
            (checkpoint / "MANIFEST.json").write_text("{}")
    return folder


def test_a_newer_checkpoint_on_another_host_is_refused_by_all_and_both_are_named(tmp_path: Path) -> None:
    folders = [disk(tmp_path / "a"), disk(tmp_path / "b", 3, 12), disk(tmp_path / "c", 5)]
    said = run_on_ranks(3, asked, folders, "auto")
    assert said == [
        f"run.output_dir is {str(folder)!r}, where node1 (rank 1) has checkpoint-12 and node0, where rank 0 is, has none; "
        "accepted: rank 0 started on node1, the folder copied to node0, another run.output_dir, or checkpoint.resume=none to "
        "begin anew"
        for folder in folders
    ]


def test_one_that_is_behind_is_told_how_far_it_is(tmp_path: Path) -> None:
    folders = [disk(tmp_path / "a", 9), disk(tmp_path / "b", 10)]
    assert all("has checkpoint-10 and node0, where rank 0 is, has nothing after checkpoint-9;" in said
               for said in run_on_ranks(2, asked, folders, "auto"))  # fmt: skip


@pytest.mark.parametrize("resume", ["none", None, "runs/other/checkpoint-4"])
def test_whoever_says_where_to_begin_begins_there(resume: str | None, tmp_path: Path) -> None:
    folders = [disk(tmp_path / "a"), disk(tmp_path / "b", 10)]
    assert run_on_ranks(2, asked, folders, resume) == ["goes on"] * 2


def test_what_is_as_old_or_not_whole_does_not_count(tmp_path: Path) -> None:
    torn = disk(disk(tmp_path / "c", 7), 8, whole=False)
    folders = [disk(tmp_path / "a", 7), disk(tmp_path / "b", 6, 7), torn]
    assert run_on_ranks(3, asked, folders, "auto") == ["goes on"] * 3
