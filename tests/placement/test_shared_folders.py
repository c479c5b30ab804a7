"""Which ranks see a folder is found out by what rank 0 writes there. Separate disks are separate paths here."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from dist_subspace.placement.collectives import world
from dist_subspace.placement.shared_folders import look_anew, seen_by_ranks
from tests.ranks import run_on_ranks


def look(folders: list[Path]) -> tuple[list[bool], list[str]]:
    """What all ranks see, and what is left in this rank's folder."""
    folder = folders[world().rank]
    seen = seen_by_ranks(folder, patience=0.5)
    return seen, sorted(os.listdir(folder)) if folder.is_dir() else ["no folder"]


def test_a_folder_is_shared_by_the_ranks_that_see_what_rank_0_writes(tmp_path: Path) -> None:
    shared, apart = tmp_path / "new" / "shared", tmp_path / "apart"
    (tmp_path / "link").symlink_to(tmp_path / "new")  # another name of the same
    found = run_on_ranks(3, look, [shared, apart, tmp_path / "link" / "shared"])
    assert [seen for seen, _ in found] == [[True, False, True]] * 3
    assert [left for _, left in found] == [[], ["no folder"], []], "nothing stays, and only rank 0 makes a folder"


def test_a_copy_of_the_folder_is_another_folder(tmp_path: Path) -> None:
    for name in ("one", "copy"):
        (tmp_path / name).mkdir()
        for mark in (".seen-0", ".seen-" + "0" * 32):
            (tmp_path / name / mark).write_text(mark)
    assert [seen for seen, _ in run_on_ranks(2, look, [tmp_path / "one", tmp_path / "copy"])] == [[True, False]] * 2


def late(folder: Path, link: Path) -> list[bool]:
    """Rank 1's way to the folder comes into being while it looks."""
    if world().rank == 0:
        return seen_by_ranks(folder, patience=20.0)
    timer = threading.Timer(1.0, link.symlink_to, [folder])
    timer.start()
    seen = seen_by_ranks(link, patience=20.0)
    timer.join()
    return seen


def test_what_comes_into_sight_after_a_moment_is_seen(tmp_path: Path) -> None:
    assert run_on_ranks(2, late, tmp_path / "run", tmp_path / "link") == [[True, True]] * 2


def test_where_rank_0_cannot_write_every_rank_has_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "folder"
    assert run_on_ranks(2, look, [blocked, tmp_path]) == [([True, False], ["no folder"]), ([True, False], ["file"])]


def test_marks_of_processes_that_were_killed_are_cleared_and_those_of_others_are_not(tmp_path: Path) -> None:
    for name, age in ((".seen-old", 7200), (".seen-new", 60), ("else", 7200)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (_, left), _ = run_on_ranks(2, look, [tmp_path] * 2)
    assert left == [".seen-new", "else"]


def test_one_rank_sees_what_it_writes_and_writes_nothing(tmp_path: Path) -> None:
    assert seen_by_ranks(tmp_path / "none") == [True]
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_not_there_may_be_looked_at(tmp_path: Path) -> None:
    look_anew(tmp_path / "none" / "below")
